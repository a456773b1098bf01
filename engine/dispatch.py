"""Calling hooks: who pays for the time, and what happens when a plugin fails.

A plugin whose absence changes no token (`identical`, `rounding`) is taken out of the sequence's plan and the request goes on;
any other ends that request with a named error. Nobody else's request notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from pitlane.engine.errors import PluginFailed
from pitlane.engine.plan import Hook, HookError, Plan, Settings
from pitlane.engine.plugin import Plugin
from pitlane.engine.types import Rows, Sequence

log = logging.getLogger("pitlane")


class Dispatcher:
    """Calls hooks for sequences; `resolve` makes the plan that a failed plugin is no part of."""

    def __init__(self, resolve: Callable[[Settings], Plan]) -> None:
        self._resolve = resolve

    def first(self, seqs: list[Sequence], name: str, /, **values: Any) -> Any:
        """First result of a hook for sequences of one plan."""
        try:
            return seqs[0].plan.first(name, lambda plugin, seconds: _charge(seqs, plugin, seconds), **values)
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
            if adjusted is not None and adjusted.shape == rows.logits.shape:
                rows.logits = adjusted
            elif adjusted is not None:
                shapes = f"{tuple(adjusted.shape)}, not {tuple(rows.logits.shape)}"
                self.degrade(rows.seqs, HookError(hook.plugin, hook.name, ValueError(f"returned shape {shapes}")))

    def tell(self, plugins: Iterable[Plugin], name: str, /, **values: Any) -> None:
        """A hook of plugins outside any request; what one raises is logged."""
        for plugin in plugins:
            if hasattr(plugin, name):
                try:
                    getattr(plugin, name)(**values)
                except Exception:
                    log.exception("plugin %s failed in %s", plugin.name, name)

    def degrade(self, seqs: list[Sequence], error: HookError) -> None:
        """Go on without a failed plugin, or end the requests."""
        plugin = error.plugin
        log.warning("plugin failed: %s", error, exc_info=error.__cause__)
        for seq in seqs:
            seq.failed[plugin.name] = str(error)
            if plugin.exactness_for(plugin.options) in ("identical", "rounding"):
                seq.plan = self._resolve({k: v for k, v in seq.plan.settings.items() if k != plugin.name})
            else:
                seq.error = PluginFailed(f"{error}; take {plugin.name} out of the plan and ask again")

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
