"""Makes plans from settings: checks options, refuses conflicts, shares and closes plugin instances.

Equal settings give the same plan, and equal options the same plugin instance. The planner holds only the last `NUM_RECENT` plans.
When the last plan with an instance is gone, the instance is closed.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from pitlane.engine.border import shown
from pitlane.engine.errors import BadOption, PitlaneError, PlanConflict, PluginFailed
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.hooks import Hook
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.plugin import Plugin, PluginOptions
from pitlane.engine.plan.registry import PluginRegistry, check_roles
from pitlane.engine.plan.validation import check_exactness, hooks_of

log = logging.getLogger("pitlane")
NUM_RECENT = 8


class Planner:
    """Resolves settings to plans. context: if it is None, `unavailable` of the plugins is not checked."""

    def __init__(self, registry: PluginRegistry, context: BuildContext | None = None) -> None:
        self.registry = registry
        self.context = context
        self._plugins: dict[str, Plugin] = {}
        self._num_plans: Counter[str] = Counter()  # by plugin key: live plans with this instance
        self._plans: weakref.WeakValueDictionary[tuple[str, ...], Plan] = weakref.WeakValueDictionary()
        self._recent: deque[Plan] = deque(maxlen=NUM_RECENT)  # keeps the plugin instances of the last plans
        # Keys of collected plans, in a queue: a finalizer must take no lock.
        self._gone: SimpleQueue[tuple[str, ...]] = SimpleQueue()
        self._lock = Lock()  # the engine's thread takes it too, so no model is loaded under it

    def resolve(self, settings: Settings) -> Plan:
        """Return the plan of the settings. Raises UnknownPlugin, BadOption, PlanConflict or PluginFailed."""
        self.check(settings)
        parsed = [(self.registry.get(name), self._parse(name, dict(options))) for name, options in settings.items()]
        keys = [_key(plugin, options) for plugin, options in parsed]  # outside the lock: a key may hash files
        with self._lock:
            instances = [self._plugin(key, *chosen) for key, chosen in zip(keys, parsed, strict=True)]
            plugins = sorted(instances, key=lambda plugin: (plugin.stage, plugin.name))
            key = tuple(plugin.key for plugin in plugins)
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = Plan(tuple(plugins), _flatten(plugins))
                self._num_plans.update(key)
                weakref.finalize(plan, self._gone.put, key).atexit = False
            if plan in self._recent:
                self._recent.remove(plan)
            self._recent.append(plan)
            self._close_unused()
            return plan

    def extended(self, plan: Plan, plugin: Plugin) -> Plan:
        """Return a plan with one more plugin that is not in the registry, for a measurement. The caller keeps `plan` alive."""
        plugins = sorted((*plan.plugins, plugin), key=lambda plugin: (plugin.stage, plugin.name))
        return Plan(tuple(plugins), _flatten(plugins))

    def settings(self, plugins: Settings | Callable[[Settings], Settings] | None, documents: bool = False) -> Settings:
        """Return the settings of an engine's default plan.

        plugins: these settings; or a callable that receives the default settings; None = the default settings. documents: the
        default settings are those for questions about a document.
        """
        if plugins is not None and not callable(plugins):
            return plugins
        default = self.registry.default_settings(self.context, documents)
        return default if plugins is None else plugins(default)

    def check(self, settings: Settings) -> None:
        """Raise the errors of `resolve`, but make no plugin: a new plugin may open files and start threads."""
        if not isinstance(settings, Mapping) or not all(isinstance(options, Mapping) for options in settings.values()):
            raise BadOption(f"plugins must be {{name: {{option: value}}}}, got {shown(settings)}")
        for name, options in settings.items():
            self._parse(name, dict(options))
        _check([self.registry.get(name) for name in settings])

    def close(self) -> None:
        """Close every plugin instance."""
        with self._lock:
            self._recent.clear()
            self._num_plans.clear()
            self._close_unused()

    def _plugin(self, key: str, plugin_class: type[Plugin], options: PluginOptions) -> Plugin:
        if key in self._plugins:
            return self._plugins[key]
        name = plugin_class.name
        try:
            check_exactness(plugin_class, options)
            plugin = plugin_class(options)
            reason = plugin.refusal(self.context) if self.context else None
            if reason:
                plugin.close()
                raise BadOption(
                    f"{name} cannot serve this model: {reason}; change its options, or take it out of the plan"
                )
            # The instance's own key counts: a file that the options name may have changed since `key` was made.
            return self._plugins.setdefault(plugin.key, plugin)
        except PitlaneError:
            raise
        except Exception as error:
            raise _cannot_start(name, error) from error

    def _parse(self, name: str, options: dict[str, Any]) -> PluginOptions:
        plugin_class = self.registry.get(name)
        name = plugin_class.name
        if self.registry.entries[name].serves_host:
            raise BadOption(f"{name} is always on and belongs to no plan; take it out of the plan")
        parsed = plugin_class.parse_options(options)
        try:
            reason = plugin_class.unavailable(self.context) if self.context else None
        except Exception as error:
            raise PluginFailed(f"{name}.unavailable failed: {type(error).__name__}: {error}") from error
        if reason:
            raise BadOption(f"{name} is unavailable: {reason}; take it out of the plan")
        return parsed

    def _close_unused(self) -> None:
        """Close the instances whose last plan is gone."""
        while True:
            try:
                self._num_plans.subtract(self._gone.get_nowait())
            except Empty:
                break
        for key in [key for key in self._plugins if self._num_plans[key] <= 0]:
            plugin = self._plugins.pop(key)
            self._num_plans.pop(key, None)
            try:
                plugin.close()
            except Exception:
                log.exception("plugin %s could not be closed", plugin.name)


def _key(plugin: type[Plugin], options: PluginOptions) -> str:
    try:
        key = plugin.key_of(options)
        if not isinstance(key, str):
            raise TypeError(f"key_of returned {shown(key)}, not a text")
        return key
    except PitlaneError:
        raise
    except Exception as error:
        raise _cannot_start(plugin.name, error) from error


def _cannot_start(name: str, error: Exception) -> PluginFailed:
    return PluginFailed(f"{name} cannot start: {type(error).__name__}: {error}")


def _check(plugins: Sequence[type[Plugin]]) -> None:
    """Raise PlanConflict if the plugins cannot be in one plan. plugins: in the order of the settings."""
    check_roles(plugins)
    names = {plugin.name for plugin in plugins}
    if len(names) < len(plugins):
        raise PlanConflict(f"a plugin is named twice, by its present and by a former name: {', '.join(sorted(names))}")
    for plugin in plugins:
        for other in plugin.conflicts:
            if other in names:
                raise PlanConflict(f"{plugin.name} cannot run with {other}; take one of them out")
        for other in plugin.requires:
            if other not in names:
                raise PlanConflict(f"{plugin.name} requires {other}; enable it too")


def _flatten(plugins: Sequence[Plugin]) -> dict[str, tuple[Hook, ...]]:
    hooks: dict[str, list[Hook]] = {}
    for plugin in plugins:
        for name in hooks_of(type(plugin)):
            hooks.setdefault(name, []).append(Hook.of(plugin, SPECS[name]))
    return {name: tuple(implementations) for name, implementations in hooks.items()}
