"""A plan: a set of plugins and their options, resolved once and frozen.

`variant_key` selects the weights, `lane_key` the lane with its KV. A plan never changes: to toggle a plugin, use another plan for
the next request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, TypeAlias

from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.hooks import Hook, Kind
from pitlane.engine.plan.plugin import EXACTNESS, Exactness, Plugin

Settings: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Plan:
    """A resolved set of plugins. hooks: the implementations of every hook in call order, by name of the hook."""

    plugins: tuple[Plugin, ...]
    hooks: Mapping[str, tuple[Hook, ...]]

    def hook(self, name: str) -> tuple[Hook, ...]:
        """Return the implementations of a hook, or () if no plugin has the hook."""
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
    def logit_runs(self) -> tuple[tuple[bool, tuple[Hook, ...]], ...]:
        """The `adjust_logits` hooks in call order, as runs: whether the plugins of a run are `identical`, and the hooks."""
        runs = groupby(self.hook("adjust_logits"), key=lambda hook: _is_identical(hook.plugin))
        return tuple((is_identical, tuple(hooks)) for is_identical, hooks in runs)

    @cached_property
    def variant_key(self) -> tuple[str, ...]:
        """Plans with an equal key share weights."""
        return self._key("variant")

    @property
    def weight_plugins(self) -> list[str]:
        """Names of the plugins of the variant key."""
        return [plugin.name for plugin in self.plugins if plugin.key in self.variant_key]

    @cached_property
    def lane_key(self) -> tuple[str, ...]:
        """Plans with an equal key share a lane and its KV."""
        return self._key("variant", "lane")

    @property
    def kv_key(self) -> tuple[str, ...]:
        """Keys of the plugins that can change the KV of a token. Stored KV is valid only under an equal `kv_key`."""
        # Under another visibility, and read from another store, KV differs, whatever exactness the plugin declares.
        changing = {hook.plugin.name for name in ("trim_cache", "build_kv_store") for hook in self.hook(name)}
        return tuple(
            plugin.key
            for plugin in self.plugins
            if plugin.key in self.lane_key
            and (plugin.name in changing or plugin.exactness_for(plugin.options) != "identical")
        )

    @property
    def exactness(self) -> Exactness:
        """The least exact class of the plugins."""
        classes: list[Exactness] = [plugin.exactness_for(plugin.options) for plugin in self.plugins]
        return max(classes, key=list(EXACTNESS).index, default="identical")

    def for_drafter(self, context: BuildContext) -> Plan:
        """Return the plan that builds a draft model: the `identical` and `rounding` plugins that can serve the draft model."""
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


def _is_identical(plugin: Plugin) -> bool:
    return plugin.exactness_for(plugin.options) == "identical"
