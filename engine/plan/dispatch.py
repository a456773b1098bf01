"""Calls the hooks of running sequences, charges their time to the sequences, and handles plugins that fail.

A failed plugin of the class `identical` or `rounding` is taken out of the sequence's plan, and the request goes on. A failure of
any other plugin ends the request with a named error. Other requests go on in both cases. A plugin that takes most of several steps
fails too. This is measured after a call: a Python call that never returns cannot be interrupted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.plan.hooks import Answer, Check, Fail, Hook, HookError, Spent, call
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.suspension import Suspensions
from pitlane.engine.sequence import Sequence

log = logging.getLogger("pitlane")
# A plugin is too slow if its hooks take this share of a step, and this many seconds, in so many steps with the plugin in a row.
# The seconds are far beyond any built-in plugin; a single slow step, such as one that builds an index, is no failure.
SLOW_SHARE, SLOW_SECONDS, SLOW_STEPS = 0.8, 0.2, 4
# A drafter must save time. Pacing pauses it for the time of `propose` and `after_verify`, but its other hooks run in a pause too.
DRAFTER_SHARE, DRAFTER_SECONDS, DRAFTER_STEPS = 0.5, 0.02, 8


class Dispatcher:
    """Calls hooks for sequences. resolve: makes a plan from settings, to leave a failed plugin out.

    seconds: time of the hooks of every plugin since the last `check_times`, by name, without `propose`: a slow drafter is paused.
    """

    def __init__(self, resolve: Callable[[Settings], Plan], suspensions: Suspensions | None = None) -> None:
        self._resolve = resolve
        self.suspensions = suspensions or Suspensions()
        self.seconds: dict[str, float] = {}
        self._num_slow: Counter[str] = Counter()

    def call(
        self,
        seqs: list[Sequence],
        hooks: Iterable[Hook],
        check: Check | None = None,
        fail: Fail | None = None,
        /,
        **values: Any,
    ) -> Answer | None:
        """Call a hook for sequences of one plan. They share its time, and a plugin that fails is dropped for all of them.

        fail: handles an error instead.
        """
        spent: list[Spent] = []
        try:
            return call(hooks, spent, fail or (lambda error: self.drop(seqs, error)), check, **values)
        finally:
            self._charge(seqs, spent)

    def _charge(self, seqs: list[Sequence], spent: list[Spent]) -> None:
        """Book the time of hooks. Runs after the hooks, so that its own time is no plugin's."""
        if not spent:
            return
        totals = self.seconds if spent[0][0].spec.name != "propose" else {}
        owners = [seq.timing.plugin_seconds for seq in seqs]
        for hook, seconds in spent:
            name = hook.name
            totals[name] = totals.get(name, 0.0) + seconds
            for times in owners:
                times[name] = times.get(name, 0.0) + seconds / len(owners)

    def tell(self, hooks: Iterable[Hook], /, **values: Any) -> None:
        """Call hooks that belong to no sequence; failures are logged and counted."""
        call(hooks, None, self._note, **values)

    def check_times(self, seqs: Iterable[Sequence], step_seconds: float) -> None:
        """Drop the plugins that took most of this step and of the steps before. seqs: of the step. Starts `seconds` anew."""
        times, self.seconds = self.seconds, {}
        if max(times.values(), default=0.0) < min(SLOW_SECONDS, DRAFTER_SECONDS):
            self._num_slow.clear()
            return
        seqs = list(seqs)
        drafters = {seq.plan.drafter.name for seq in seqs if seq.plan.drafter is not None}
        for name, seconds in times.items():
            share, least, num_steps = SLOW_SHARE, SLOW_SECONDS, SLOW_STEPS
            if name in drafters:
                share, least, num_steps = DRAFTER_SHARE, DRAFTER_SECONDS, DRAFTER_STEPS
            if seconds < max(least, share * step_seconds):
                self._num_slow.pop(name, None)
                continue
            self._num_slow[name] += 1
            if self._num_slow[name] < num_steps:
                continue
            del self._num_slow[name]
            share = 100 * times[name] / max(step_seconds, times[name])
            cause = TimeoutError(f"took {times[name]:.2g} s, {share:.0f} % of a step, {num_steps} steps in a row")
            owners: dict[Plugin, list[Sequence]] = {}
            for seq in seqs:
                for plugin in seq.plan.plugins:
                    if plugin.name == name:
                        owners.setdefault(plugin, []).append(seq)
            for plugin, own_seqs in owners.items():
                self.drop(own_seqs, HookError(plugin, "hooks", cause))

    def leave_out_suspended(self, seqs: list[Sequence]) -> None:
        """Take suspended plugins out of the plan of a new request. Set `error` if the request cannot do without."""
        for plugin in seqs[0].plan.plugins if self.suspensions.reasons else ():
            reason = self.suspensions.reasons.get(plugin.name)
            if reason is not None:
                self._leave_out(seqs, plugin, reason)

    def drop(self, seqs: list[Sequence], error: HookError) -> None:
        """Take a failed plugin out of the plans of sequences. Set `error` if a sequence cannot go on without it."""
        self._note(error)
        self._leave_out(seqs, error.plugin, str(error))

    def _leave_out(self, seqs: list[Sequence], plugin: Plugin, reason: str) -> None:
        for seq in seqs:
            seq.failed[plugin.name] = reason
            smaller_plan = self._without(seq.plan, plugin)
            if smaller_plan is not None:
                seq.plan = smaller_plan
            elif seq.error is None:
                about = "" if reason.startswith(plugin.name) else f"{plugin.name} is "
                seq.error = PluginFailed(f"{about}{reason}; take {plugin.name} out of the plan and ask again")

    def _note(self, error: HookError) -> None:
        """Log a failure and count it. A plugin that fails again and again is suspended."""
        log.warning("plugin failed: %s", error, exc_info=error.__cause__)
        reason = self.suspensions.failed(error)
        if reason is not None:
            log.warning("plugin %s is %s", error.plugin.name, reason)

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


def named(error: BaseException, failure: str) -> PitlaneError:
    """Return a PitlaneError as it is. Put any other error into a PitlaneError that begins with `failure`."""
    return error if isinstance(error, PitlaneError) else PitlaneError(f"{failure}: {type(error).__name__}: {error}")
