"""Calling hooks: who pays for the time, and what happens when a plugin fails.

A plugin whose absence changes no token (`identical`, `rounding`) is taken out of the sequence's plan and the request goes on;
any other ends that request with a named error. Nobody else's request notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.plan import Hook, HookError, Plan, Settings
from pitlane.engine.plugin import Plugin
from pitlane.engine.types import Rows, Sequence

log = logging.getLogger("pitlane")


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
        """Fold `adjust_logits` over the rows of one plan."""
        for hook in rows.seqs[0].plan.hooks.get("adjust_logits", ()):
            adjusted = self._call(rows.seqs, hook, rows=rows)
            shape = getattr(adjusted, "shape", None)
            if shape == rows.logits.shape:
                rows.logits = adjusted
            elif adjusted is not None:
                wrong = TypeError(f"returned {shape or adjusted!r}, not a tensor of shape {tuple(rows.logits.shape)}")
                self.degrade(rows.seqs, HookError(hook.plugin, hook.name, wrong))

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


def _charge(seqs: list[Sequence], plugin: str, seconds: float) -> None:
    for seq in seqs:
        seq.timing.charge(plugin, seconds / len(seqs))
