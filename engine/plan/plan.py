"""A plan: a set of plugins and settings, resolved once and frozen.

Roles, requirements and conflicts are checked, hooks are flattened to callables with a timer each, and the keys that decide
which weights (variant) and which KV (lane) it uses are computed. Toggling a plugin is another plan for the next request;
nothing is registered, unregistered or mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

from pitlane.engine.border import shown
from pitlane.engine.errors import BadOption, PitlaneError, PlanConflict, PluginFailed
from pitlane.engine.plan.hookspecs import LANE_HOOKS, LOADING_HOOKS, VARIANT_HOOKS
from pitlane.engine.plan.plugin import Plugin, PluginOptions
from pitlane.engine.plan.registry import PluginRegistry, arguments_of, hooks_of

if TYPE_CHECKING:
    from pitlane.engine.types import BuildContext

Settings: TypeAlias = Mapping[str, Mapping[str, Any]]
Charge: TypeAlias = Callable[[str, float], None]


class HookError(Exception):
    """A plugin raised something unforeseen; carries the plugin and the cause."""

    def __init__(self, plugin: Plugin, hook: str, cause: BaseException) -> None:
        super().__init__(f"{plugin.name}.{hook}: {type(cause).__name__}: {cause}")
        self.plugin = plugin


@dataclass(slots=True)
class Hook:
    """One implementation of one hook, with what its last call took."""

    plugin: Plugin
    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    seconds: float = 0.0

    def __call__(self, /, **values: Any) -> Any:
        start = perf_counter()
        try:
            return self.function(*[values[name] for name in self.arguments])
        except (Exception, SystemExit) as error:  # a plugin that calls sys.exit() would end the engine's thread
            if isinstance(error, PitlaneError) and self.name in LOADING_HOOKS:
                raise  # while loading it reaches whoever asked; in a step it must end no other request
            raise HookError(self.plugin, self.name, error) from error
        finally:
            self.seconds = perf_counter() - start

    def checked(self, check: Callable[[Any], Any], result: Any) -> Any:
        """What `check` makes of a result."""
        try:
            return check(result)
        except Exception as error:
            raise HookError(self.plugin, self.name, error) from error


@dataclass(frozen=True, eq=False)
class Plan:
    """A resolved set of plugins. `hooks[name]` are its implementations in order."""

    plugins: tuple[Plugin, ...]
    hooks: Mapping[str, tuple[Hook, ...]]

    @property
    def names(self) -> list[str]:
        return [plugin.name for plugin in self.plugins]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return {plugin.name: plugin.options.model_dump() for plugin in self.plugins}

    @property
    def drafter(self) -> Plugin | None:
        """The plugin that proposes drafts."""
        hooks = self.hooks.get("propose")
        return hooks[0].plugin if hooks else None

    @property
    def variant_key(self) -> tuple[str, ...]:
        return self._keys(VARIANT_HOOKS)

    @property
    def lane_key(self) -> tuple[str, ...]:
        return self._keys(VARIANT_HOOKS | LANE_HOOKS)

    @property
    def kv_key(self) -> tuple[str, ...]:
        """Key plugins whose KV differs from the plain one's."""
        keys = set(self.lane_key)
        return tuple(p.key for p in self.plugins if p.key in keys and p.exactness_for(p.options) != "identical")

    def _keys(self, wanted: frozenset[str]) -> tuple[str, ...]:
        return tuple(plugin.key for plugin in self.plugins if wanted & set(hooks_of(type(plugin))))

    def for_drafter(self, context: BuildContext) -> Plan:
        """The plugins that would build a draft model too: those that can serve it, and keep its function."""
        found = {p for p in self.plugins if p.exactness_for(p.options) in ("identical", "rounding")}
        found = {p for p in found if p.unavailable(context) is None}
        hooks = {name: tuple(hook for hook in hooks if hook.plugin in found) for name, hooks in self.hooks.items()}
        return Plan(tuple(p for p in self.plugins if p in found), hooks)

    def first(self, name: str, charge: Charge, check: Callable[[Any], Any] | None = None, /, **values: Any) -> Any:
        """First result that is not None, passed through `check`, whose exceptions count as the plugin's.

        `charge(plugin name, seconds)` is told what each call took.
        """
        for hook in self.hooks.get(name, ()):
            try:
                result = hook(**values)
            finally:
                charge(hook.plugin.name, hook.seconds)
            if result is not None:
                return result if check is None else hook.checked(check, result)
        return None

    def exactness(self) -> str:
        """The weakest class among its plugins."""
        order = ["identical", "rounding", "approximate", "steering"]
        return max((p.exactness_for(p.options) for p in self.plugins), key=order.index, default="identical")


class Planner:
    """Resolves settings to plans; equal settings give the same plan, equal options the same plugin instance."""

    def __init__(self, registry: PluginRegistry, context: BuildContext | None = None) -> None:
        self.registry = registry
        self.context = context  # of the model, once it is known
        self._plugins: dict[str, Plugin] = {}
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._lock = Lock()  # the engine's thread plans too, and never waits for a load

    def resolve(self, settings: Settings) -> Plan:
        """Raises UnknownPlugin, BadOption, PlanConflict or PluginFailed."""
        self.check(settings)
        with self._lock:
            asked = [self._plugin(name, dict(options)) for name, options in settings.items()]
            plugins = sorted(asked, key=lambda plugin: (plugin.stage, plugin.name))
            key = tuple(plugin.key for plugin in plugins)
            if key not in self._plans:
                self._plans[key] = Plan(tuple(plugins), _flatten(plugins))
            return self._plans[key]

    def check(self, settings: Settings) -> None:
        """Refuse what `resolve` refuses, before a plugin is made: making one may open files and start threads."""
        if not isinstance(settings, Mapping) or not all(isinstance(options, Mapping) for options in settings.values()):
            raise BadOption(f"plugins must be {{name: {{option: value}}}}, got {shown(settings)}")
        for name, options in settings.items():
            self._parse(name, dict(options))
        _check([self.registry.get(name) for name in settings])

    def live_hooks(self, name: str) -> tuple[Hook, ...]:
        """A hook of every plugin that some plan has used."""
        return _flatten(list(self._plugins.values())).get(name, ())

    def _plugin(self, name: str, options: dict[str, Any]) -> Plugin:
        plugin_class, parsed = self.registry.get(name), self._parse(name, options)
        key = f"{name}{parsed.model_dump_json()}"
        if key not in self._plugins:
            try:
                self._plugins[key] = plugin_class(parsed)
            except PitlaneError:
                raise
            except Exception as error:
                raise PluginFailed(f"{name} cannot start: {type(error).__name__}: {error}") from error
        return self._plugins[key]

    def _parse(self, name: str, options: dict[str, Any]) -> PluginOptions:
        plugin_class = self.registry.get(name)
        if self.registry.entries[name].serves_host:
            raise BadOption(f"{name} serves the host and is always on; it is no part of a plan")
        parsed = plugin_class.parse_options(options)
        reason = plugin_class.unavailable(self.context) if self.context else None
        if reason:
            raise BadOption(f"{name} is unavailable: {reason}; take it out of the plan")
        return parsed


def _check(plugins: Sequence[type[Plugin]]) -> None:
    """Refuse what cannot be together; plugins come in the order in which they were asked for."""
    _check_roles(plugins)
    names = {plugin.name for plugin in plugins}
    for plugin in plugins:
        for other in plugin.conflicts:
            if other in names:
                raise PlanConflict(f"{plugin.name} cannot run with {other}; take one of them out")
        for other in plugin.requires:
            if other not in names:
                raise PlanConflict(f"{plugin.name} requires {other}; enable it too")


def _check_roles(plugins: Sequence[type[Plugin]]) -> None:
    """Refuse two plugins of one role."""
    holders: dict[str, str] = {}
    for plugin in plugins:
        holder = holders.setdefault(plugin.role, plugin.name) if plugin.role else plugin.name
        if holder != plugin.name:
            raise PlanConflict(f"{plugin.role} is held by {holder}; take it out to enable {plugin.name}")


def _flatten(plugins: Sequence[Plugin]) -> dict[str, tuple[Hook, ...]]:
    hooks: dict[str, list[Hook]] = {}
    for plugin in plugins:
        for name in hooks_of(type(plugin)):
            function = getattr(plugin, name)
            hooks.setdefault(name, []).append(Hook(plugin, name, function, arguments_of(function)))
    return {name: tuple(found) for name, found in hooks.items()}
