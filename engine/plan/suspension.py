"""Plugins that failed again and again are suspended: for the rest of the process, requests go on without them, or are refused.

The counts belong to a registry, so all engines that share the registry share them. A request that ends well with a plugin sets the
count of the plugin to zero. An error of a user, such as a wrong option, is no failure of a plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from pitlane.engine.errors import PitlaneError
from pitlane.engine.plan.hooks import HookError

MAX_FAILURES = 3  # failures in a row after which a plugin is suspended


class Suspensions:
    """reasons: of the suspended plugins, by name. told: gets the name and the reason of a plugin that is suspended."""

    def __init__(self, told: Callable[[str, str], None] = lambda name, reason: None) -> None:
        self.reasons: dict[str, str] = {}
        self._told = told
        self._counts: Counter[str] = Counter()

    def failed(self, error: HookError) -> str | None:
        """Count a failure of a plugin. Returns the reason if the plugin is suspended by this failure, else None."""
        name = error.plugin.name
        if isinstance(error.__cause__, PitlaneError) or name in self.reasons:
            return None
        self._counts[name] += 1
        if self._counts[name] < MAX_FAILURES:
            return None
        self.reasons[name] = f"suspended for this process after {MAX_FAILURES} failures, the last: {error}"
        self._told(name, self.reasons[name])
        return self.reasons[name]

    def ended_well(self, names: Iterable[str]) -> None:
        """Note that a request ended without a failure of these plugins."""
        for name in names:
            self._counts.pop(name, None)
