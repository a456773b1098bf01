"""A plan: a set of plugins and their options, resolved once and frozen.

Its hooks are flattened, and its keys say which weights (variant) and which KV (lane) it uses. To toggle a plugin is to use
another plan for the next request; nothing is registered, unregistered or mutated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.hooks import Hook, Kind
from pitlane.engine.plan.plugin import EXACTNESS, Exactness, Plugin

Settings: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Plan:
    """A resolved set of plugins. hooks: by name, the implementations of a hook in the order of their calls."""

    plugins: tuple[Plugin, ...]
    hooks: Mapping[str, tuple[Hook, ...]]

    def hook(self, name: str) -> tuple[Hook, ...]:
        """The implementations of a hook; none if no plugin has it."""
        return self.hooks.get(name, ())

    @property
    def names(self) -> list[str]:
        return [plugin.name for plugin in self.plugins]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return {plugin.name: plugin.options.model_dump() for plugin in self.plugins}

    @cached_property
    def drafter(self) -> Plugin | None:
        """The plugin that proposes drafts."""
        return next((plugin for plugin in self.plugins if plugin.role == "drafter"), None)

    @cached_property
    def variant_key(self) -> tuple[str, ...]:
        """Plans with an equal key share weights."""
        return self._key("variant")

    @cached_property
    def lane_key(self) -> tuple[str, ...]:
        """Plans with an equal key share a lane and its KV."""
        return self._key("variant", "lane")

    @property
    def kv_key(self) -> tuple[str, ...]:
        """The plugins under which the KV of a token differs from the KV of the bare core."""
        return tuple(
            p.key for p in self.plugins if p.key in self.lane_key and p.exactness_for(p.options) != "identical"
        )

    @property
    def exactness(self) -> Exactness:
        """The weakest class among the plugins."""
        classes: list[Exactness] = [plugin.exactness_for(plugin.options) for plugin in self.plugins]
        return max(classes, key=list(EXACTNESS).index, default="identical")

    def for_drafter(self, context: BuildContext) -> Plan:
        """The plan that builds a draft model: those plugins that can serve the draft model and keep its function."""
        kept = [
            plugin
            for plugin in self.plugins
            if plugin.exactness_for(plugin.options) in ("identical", "rounding") and plugin.unavailable(context) is None
        ]
        hooks = {name: tuple(hook for hook in hooks if hook.plugin in kept) for name, hooks in self.hooks.items()}
        return Plan(tuple(kept), hooks)

    def _key(self, *kinds: Kind) -> tuple[str, ...]:
        builders = {hook.plugin.name for hooks in self.hooks.values() for hook in hooks if hook.spec.kind in kinds}
        return tuple(plugin.key for plugin in self.plugins if plugin.name in builders)
