"""Finds plugins: built-in modules, installed packages (entry-point group `pitlane`), loose files.

A plugin that fails to import or to validate stops no other plugin: its entry has the status `failed` and the reason. Nothing is
registered globally: a planner takes classes from a registry and makes its own instances.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pluggy

from pitlane.engine.errors import BadOption, PlanConflict, UnknownPlugin
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families
from pitlane.engine.plan import hookspecs
from pitlane.engine.plan.changes import now
from pitlane.engine.plan.hooks import Check, Fail, Hook, HookError, call
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plugin import EXACTNESS, Plugin, Role

log = logging.getLogger("pitlane")

GROUP = "pitlane"
BUILT_IN_SOURCE = "built-in"
BUILT_IN = (
    "pitlane.plugins.prefix_cache",
    "pitlane.plugins.lora",
    "pitlane.plugins.packed_checkpoint",
    "pitlane.plugins.packed_linear",
    "pitlane.plugins.int8",
    "pitlane.plugins.int4",
    "pitlane.plugins.fp8",
    "pitlane.plugins.paged_attention",
    "pitlane.plugins.span_attention",
    "pitlane.plugins.kv_quant",
    "pitlane.plugins.fused_ops",
    "pitlane.plugins.compiled_step",
    "pitlane.plugins.prompt_lookup",
    "pitlane.plugins.attention_sinks",
    "pitlane.plugins.key_norm_eviction",
    "pitlane.plugins.speculative",
    "pitlane.plugins.self_speculation",
    "pitlane.plugins.jacobi",
    "pitlane.plugins.lookahead",
    "pitlane.plugins.pdf_document",
    "pitlane.plugins.text_document",
)


@dataclass(slots=True)
class PluginEntry:
    """A plugin and its source: `built-in`, `<distribution> <version>` or a file."""

    name: str
    source: str
    plugin: type[Plugin] | None = None
    reason: str = ""

    @property
    def status(self) -> str:
        return "ok" if self.plugin else "failed"

    @property
    def hooks(self) -> list[str]:
        return hooks_of(self.plugin) if self.plugin else []

    @property
    def serves_host(self) -> bool:
        """Whether the plugin has only host hooks (a document loader). It is then always on, and in no plan."""
        return bool(self.hooks) and all(SPECS[name].kind == "host" for name in self.hooks)


class PluginRegistry:
    """All plugins, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, PluginEntry] = {}
        self.families = Families(CORE_FAMILIES)

    @classmethod
    def load(cls, plugins_dir: str | Path | None = None) -> PluginRegistry:
        """Load built-in plugins, installed packages, then files of a folder. PITLANE_LOAD, if set, names the packages to load."""
        registry = cls()
        for module in BUILT_IN:
            registry._load(
                module.rpartition(".")[2], BUILT_IN_SOURCE, lambda module=module: importlib.import_module(module)
            )
        packages = os.environ.get("PITLANE_LOAD")
        names = None if packages is None else {name.strip() for name in packages.split(",")}
        for point in importlib.metadata.entry_points(group=GROUP):
            if point.dist is not None and (names is None or point.dist.name in names):
                registry._load(point.name, f"{point.dist.name} {point.dist.version}", point.load)
        folder = plugins_dir or os.environ.get("PITLANE_PLUGINS_DIR")
        if folder and not Path(folder).is_dir():
            raise BadOption(f"plugins folder {folder} is not a folder; make it, or leave --plugins-dir out")
        for path in sorted(Path(folder).glob("*.py")) if folder else ():
            registry._load(path.stem, str(path), lambda path=path: _import_file(path))
        return registry

    def add(self, plugin: type[Plugin], source: str = "test") -> type[Plugin]:
        """Validate a class, add its model families, and add it. Raises ValueError if its name or a family's name is taken."""
        validate(plugin)
        taken = self.entries.get(plugin.name)
        if taken is not None and taken.plugin is not None:
            raise ValueError(f"plugin name {plugin.name!r} is taken by {taken.source}")
        if taken is not None:  # a plugin of this name that did not load
            self.entries[f"{taken.name} ({taken.source})"] = self.entries.pop(taken.name)
        if "register_models" in hooks_of(plugin):
            families = Families(self.families)  # a plugin that fails adds no family
            call([Hook.of(plugin(), SPECS["register_models"])], None, _raise_cause, registry=families)
            self.families = families
        self.entries[plugin.name] = PluginEntry(plugin.name, source, plugin)
        return plugin

    def get(self, name: str) -> type[Plugin]:
        """Return the class of a name. Raises UnknownPlugin: it lists the known names, or says why the plugin did not load."""
        entry = self.entries.get(name)
        if entry is None:
            failed = [f"{other.name} ({other.reason})" for other in self if other.plugin is None]
            not_loaded = f"; not loaded: {', '.join(failed)}" if failed else ""
            raise UnknownPlugin(f"unknown plugin {name!r}; known: {', '.join(sorted(self.togglable()))}{not_loaded}")
        if entry.plugin is None:
            raise UnknownPlugin(f"plugin {name!r} ({entry.source}) did not load: {entry.reason}")
        return entry.plugin

    def togglable(self) -> list[str]:
        return [entry.name for entry in self.entries.values() if entry.plugin and not entry.serves_host]

    def __iter__(self) -> Iterator[PluginEntry]:
        return iter(sorted(self.entries.values(), key=lambda entry: entry.name))

    def first(self, name: str, fail: Fail | None = None, check: Check | None = None, /, **values: Any) -> Any:
        """First result of a host hook over all loaded plugins. fail: handles the error of a plugin (None: raise its cause)."""
        plugins = sorted(
            (entry.plugin for entry in self if entry.plugin and name in entry.hooks),
            key=lambda plugin: (plugin.stage, plugin.name),
        )
        answer = call(
            [Hook.of(plugin(), SPECS[name]) for plugin in plugins], None, fail or _raise_cause, check, **values
        )
        return answer.value if answer else None

    def default_settings(
        self, context: BuildContext | None = None, documents: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Return the settings of the default plan: built-in default plugins that can serve the model of `context`.

        Of several plugins of a role, the first of `BUILT_IN`. documents: the settings for questions about a document; the plugins
        that were made for documents and for this model are then in the plan too (`Plugin.is_default_for_documents`).
        """
        chosen: dict[str, type[Plugin]] = {}
        for entry in self.entries.values():
            plugin = entry.plugin
            if plugin is None or entry.source != BUILT_IN_SOURCE:
                continue
            for_documents = documents and context is not None and plugin.is_default_for_documents(context)
            if not (plugin.is_default or for_documents):
                continue
            is_taken = plugin.role is not None and any(other.role == plugin.role for other in chosen.values())
            if not is_taken and (context is None or plugin.unavailable(context) is None):
                chosen[entry.name] = plugin
        return {name: {} for name in chosen}

    def _load(self, name: str, source: str, load: Any) -> None:
        try:
            loaded = load()
            classes = _classes_of(loaded) if isinstance(loaded, ModuleType) else [loaded]
            if not classes:
                raise TypeError("it holds no Plugin class")
            for plugin in classes:
                self.add(plugin, source)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            entry = PluginEntry(name, source, None, f"{type(error).__name__}: {error}")
            log.warning("plugin %s (%s) did not load: %s", name, source, entry.reason)
            key = f"{name} ({source})" if name in self.entries else name  # the entry that has the name stays
            self.entries[key] = entry


def hooks_of(plugin: type[Plugin]) -> list[str]:
    """Names of the hooks that a class implements, in call order."""
    return [name for name in SPECS if hasattr(getattr(plugin, name, None), "pitlane_impl")]


def check_roles(plugins: Sequence[type[Plugin]]) -> None:
    """Refuse two plugins of one role."""
    holders: dict[str, str] = {}
    for plugin in plugins:
        holder = holders.setdefault(plugin.role, plugin.name) if plugin.role else plugin.name
        if holder != plugin.name:
            raise PlanConflict(f"{plugin.role} is held by {holder}; take it out to enable {plugin.name}")


def validate(plugin: Any) -> None:
    """Raise an error if a class is no valid plugin. Checks name, exactness, role, options, and the hooks' names and arguments."""
    if not (inspect.isclass(plugin) and issubclass(plugin, Plugin)):
        raise TypeError(f"{plugin!r} is not a subclass of pitlane.Plugin")
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{plugin.__name__}.name must be an identifier, got {name!r}")
    if getattr(plugin, "exactness", None) not in EXACTNESS:
        raise ValueError(f"{name}.exactness must be one of {', '.join(EXACTNESS)}")
    if plugin.role is not None and plugin.role not in get_args(Role):
        raise ValueError(f"{name}.role must be None or one of {', '.join(get_args(Role))}, got {plugin.role!r}")
    for field in ("requires", "conflicts"):
        if isinstance(getattr(plugin, field), str):
            raise TypeError(f"{name}.{field} must be a tuple of names, got a text")
    plugin.parse_options({})
    _check_hooks(plugin)
    manager = pluggy.PluginManager("pitlane")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin.__new__(plugin), name)  # pluggy needs an object; it needs no `__init__`
    manager.check_pending()
    _check_role(plugin)


def _check_hooks(plugin: type[Plugin]) -> None:
    """Raise if a method is marked as a hook and is none, has the name of a hook and no mark, or takes unknown arguments."""
    for name in dir(plugin):
        method = getattr(plugin, name, None)
        is_marked = hasattr(method, "pitlane_impl")
        if is_marked and name not in SPECS:
            known = now(name) or f"; the hooks are: {', '.join(SPECS)}"
            raise ValueError(f"{plugin.name} has an unknown hook {name!r}{known}")
        if callable(method) and name in SPECS and not is_marked:
            raise ValueError(f"{plugin.name}.{name} has the name of a hook; write @hookimpl above it, or rename it")
        if is_marked:
            _check_arguments(plugin, name)


def _check_arguments(plugin: type[Plugin], name: str) -> None:
    known = list(inspect.signature(getattr(hookspecs, name)).parameters)
    for argument in Hook.of(plugin.__new__(plugin), SPECS[name]).arguments:
        if argument not in known:
            reason = now(f"{name}({argument})") or f"; its arguments are: {', '.join(known)}"
            raise ValueError(f"{plugin.name}.{name} has an unknown argument {argument!r}{reason}")


def _check_role(plugin: type[Plugin]) -> None:
    """Raise if a hook belongs to another role, or if the role's hook is missing."""
    implemented = [SPECS[name] for name in hooks_of(plugin)]
    for spec in implemented:
        if spec.role not in (None, plugin.role):
            raise ValueError(
                f'{plugin.name} implements {spec.name}, which needs role = "{spec.role}", and has role = {plugin.role!r}'
            )
    if plugin.role is not None and all(spec.role != plugin.role for spec in implemented):
        needed = " or ".join(spec.name for spec in SPECS.values() if spec.role == plugin.role)
        raise ValueError(f'{plugin.name} has role = "{plugin.role}" and must implement {needed}')


def _raise_cause(error: HookError) -> None:
    raise error.__cause__ or error


def _classes_of(module: ModuleType) -> list[type[Plugin]]:
    members = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Plugin)]
    return [value for value in members if value.__module__ == module.__name__]


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pitlane_file_{path.stem}", path)
    if not spec or not spec.loader:
        raise TypeError("a plugin is a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
