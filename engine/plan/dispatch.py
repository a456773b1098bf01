"""Calls the hooks of running sequences, charges their time to the sequences, and handles plugins that fail.

A failed plugin of the class `identical` or `rounding` is taken out of the sequence's plan, and the request goes on. A failure of
any other plugin ends the request with a named error. Other requests go on in both cases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.plan.hooks import Answer, Check, Hook, HookError, call
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence

log = logging.getLogger("pitlane")


class Dispatcher:
    """Calls hooks for sequences. resolve: makes a plan from settings, to leave a failed plugin out."""

    def __init__(self, resolve: Callable[[Settings], Plan]) -> None:
        self._resolve = resolve

    def call(
        self, seqs: list[Sequence], hooks: Iterable[Hook], check: Check | None = None, /, **values: Any
    ) -> Answer | None:
        """Call a hook for sequences of one plan. They share its time, and a plugin that fails is dropped for all of them."""

        def charge(plugin: Plugin, seconds: float) -> None:
            for seq in seqs:
                seq.timing.charge(plugin.name, seconds / len(seqs))

        return call(hooks, charge, lambda error: self.drop(seqs, error), check, **values)

    def tell(self, hooks: Iterable[Hook], /, **values: Any) -> None:
        """Call hooks that belong to no sequence; failures are logged."""
        call(hooks, None, _log, **values)

    def drop(self, seqs: list[Sequence], error: HookError) -> None:
        """Take a failed plugin out of the plans of sequences. Set `error` if a sequence cannot go on without it."""
        plugin = error.plugin
        _log(error)
        for seq in seqs:
            seq.failed[plugin.name] = str(error)
            smaller_plan = self._without(seq.plan, plugin)
            if smaller_plan is not None:
                seq.plan = smaller_plan
            elif seq.error is None:
                seq.error = PluginFailed(f"{error}; take {plugin.name} out of the plan and ask again")

    def _without(self, plan: Plan, plugin: Plugin) -> Plan | None:
        """Return the plan without a plugin, or None if the plugin changes the function or the rest is no valid plan."""
        if plugin.exactness_for(plugin.options) not in ("identical", "rounding"):
            return None
        try:
            return self._resolve({name: options for name, options in plan.settings.items() if name != plugin.name})
        except PitlaneError:
            return None


@contextmanager
def own_failure(seq: Sequence) -> Iterator[None]:
    """A failure inside ends this sequence with an error; the other sequences of the step go on."""
    try:
        yield
    except Exception as error:
        log.exception("a request failed")
        seq.error = seq.error or named(error, "the request failed")


def named(error: Exception, failure: str) -> PitlaneError:
    """Return a PitlaneError as it is. Put any other error into a PitlaneError that begins with `failure`."""
    return error if isinstance(error, PitlaneError) else PitlaneError(f"{failure}: {type(error).__name__}: {error}")


def _log(error: HookError) -> None:
    log.warning("plugin failed: %s", error, exc_info=error.__cause__)
