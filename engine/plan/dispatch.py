"""Calling hooks: who pays for the time, and what happens when a plugin fails.

A plugin whose absence changes no token (`identical`, `rounding`) is taken out of the sequence's plan and the request goes on;
any other ends that request with a named error. Nobody else's request notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from pitlane.engine.border import shown
from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.plan.plan import Hook, HookError, Plan, Settings
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.types import Rows, Sequence

log = logging.getLogger("pitlane")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Dispatcher:
    """Calls hooks for sequences; `resolve` makes the plan that a failed plugin is no part of."""

    def __init__(self, resolve: Callable[[Settings], Plan]) -> None:
        self._resolve = resolve

    def first(self, seqs: list[Sequence], name: str, check: Callable[[Any], Any], /, **values: Any) -> Any:
        """First result of a hook for sequences of one plan, passed through `check`."""
        try:
            return seqs[0].plan.first(name, lambda plugin, seconds: _charge(seqs, plugin, seconds), check, **values)
        except HookError as error:
            self.degrade(seqs, error)
            return None

    def each(self, seq: Sequence, name: str, /, **values: Any) -> None:
        """Every implementation of a hook, for one sequence."""
        for hook in seq.plan.hooks.get(name, ()):
            self._call([seq], hook, **values)

    def adjust_logits(self, rows: Rows) -> None:
        """Fold `adjust_logits` over the rows of one plan. A row that it breaks fails for its own sequence alone."""
        for hook in rows.seqs[0].plan.hooks.get("adjust_logits", ()):
            before, rows.logits = rows.logits, rows.logits.clone()  # the plugin may write into them
            try:
                found = hook(rows=rows)
                found = rows.logits if found is None else found
                rows.logits = hook.checked(partial(_logits, before=before, plugin=hook.plugin), found)
            except HookError as error:
                rows.logits = before
                self.degrade(rows.seqs, error)
            else:
                self._take_back(rows, before, hook)
            finally:
                _charge(rows.seqs, hook.plugin.name, hook.seconds)

    def _take_back(self, rows: Rows, before: Tensor, hook: Hook) -> None:
        """Undo a hook for the sequences whose next token can no longer be drawn."""
        places = [place for place, parent in enumerate(rows.parents) if parent < 0]
        for seq, peak in zip(rows.seqs, rows.logits[places].amax(-1).tolist(), strict=True):
            if isfinite(peak) or seq.error:
                continue
            what = "forbids every token" if peak == -inf else f"returned logits that hold {peak}"
            own = [row for row, index in enumerate(rows.seq_index) if rows.seqs[index] is seq]
            rows.logits[own] = before[own].to(rows.logits.dtype)
            self.degrade([seq], HookError(hook.plugin, hook.name, ValueError(f"{what}, after token {seq.num_tokens}")))

    def tell(self, hooks: Iterable[Hook], /, **values: Any) -> None:
        """Hooks outside any request; what one raises is logged."""
        for hook in hooks:
            try:
                hook(**values)
            except HookError as error:
                log.warning("plugin failed: %s", error, exc_info=error.__cause__)

    def degrade(self, seqs: list[Sequence], error: HookError) -> None:
        """Go on without a failed plugin, or end the requests."""
        plugin = error.plugin
        log.warning("plugin failed: %s", error, exc_info=error.__cause__)
        for seq in seqs:
            seq.failed[plugin.name] = str(error)
            rest = self._without(seq.plan, plugin)
            if rest is not None and rest.lane_key == seq.plan.lane_key:
                seq.plan = rest
            else:
                seq.error = PluginFailed(f"{error}; take {plugin.name} out of the plan and ask again")

    def _without(self, plan: Plan, plugin: Plugin) -> Plan | None:
        """The plan without a plugin, None where that would change tokens or another plugin requires it."""
        if plugin.exactness_for(plugin.options) not in ("identical", "rounding"):
            return None
        try:
            return self._resolve({name: options for name, options in plan.settings.items() if name != plugin.name})
        except PitlaneError:
            return None

    def _call(self, seqs: list[Sequence], hook: Hook, /, **values: Any) -> Any:
        try:
            return hook(**values)
        except HookError as error:
            self.degrade(seqs, error)
            return None
        finally:
            _charge(seqs, hook.plugin.name, hook.seconds)


@contextmanager
def own_failure(seq: Sequence) -> Iterator[None]:
    """What fails inside ends this sequence with an error; the others of the step go on."""
    try:
        yield
    except Exception as error:
        log.exception("a request failed")
        seq.error = seq.error or named(error, "the request failed")


def named(error: Exception, what: str) -> PitlaneError:
    """The error itself if people can read it, else one that says what failed."""
    return error if isinstance(error, PitlaneError) else PitlaneError(f"{what}: {type(error).__name__}: {error}")


def _logits(found: object, before: Tensor, plugin: Plugin) -> Tensor:
    """`found`, if its type, shape and device fit `before`, and an identical plugin left the values as they were. Else raises."""
    if not isinstance(found, Tensor) or found.shape != before.shape:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
        raise TypeError(f"returned {got}, not a tensor of shape {tuple(before.shape)}")
    if found.dtype not in FLOATS or found.device != before.device:
        raise TypeError(f"returned {found.dtype} on {found.device}, not {before.dtype} on {before.device}")
    if plugin.exactness_for(plugin.options) == "identical" and not _equal(found, before):
        raise ValueError("changed the logits, but is declared identical; declare the plugin steering")
    return found


def _equal(found: Tensor, before: Tensor) -> bool:
    return torch.equal(found.to(before.dtype).nan_to_num(), before.nan_to_num())


def _charge(seqs: list[Sequence], plugin: str, seconds: float) -> None:
    for seq in seqs:
        seq.timing.charge(plugin, seconds / len(seqs))
