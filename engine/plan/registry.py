"""Finding plugins: built-in ones, installed packages (entry-point group `pitlane`), loose files.

Loading is isolated: whatever fails to import or to validate is kept as an entry with status `failed` and its reason, and
never stops the rest. Nothing is registered globally: a plan picks classes from here and makes its own instances.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pluggy

from pitlane.engine.errors import BadOption, UnknownPlugin
from pitlane.engine.plan import hookspecs
from pitlane.engine.plan.plugin import EXACTNESS, Plugin, Role

log = logging.getLogger("pitlane")

GROUP = "pitlane"
BUILT_IN = (
    "pitlane.plugins.prefix_cache",
    "pitlane.plugins.packed_linear",
    "pitlane.plugins.paged_attention",
    "pitlane.plugins.fused_ops",
    "pitlane.plugins.prompt_lookup",
    "pitlane.plugins.speculative",
    "pitlane.plugins.self_speculation",
    "pitlane.plugins.jacobi",
    "pitlane.plugins.lookahead",
    "pitlane.plugins.pdf_document",
    "pitlane.plugins.text_document",
)


@dataclass(slots=True)
class PluginEntry:
    """One plugin that was found. source: `built-in`, `<distribution> <version>` or a file."""

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
        """Whether it only has hooks outside plans (document loaders): always on, nothing to toggle."""
        return bool(self.hooks) and set(self.hooks) <= hookspecs.HOST_HOOKS


class PluginRegistry:
    """All plugins that were found, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, PluginEntry] = {}

    @classmethod
    def load(cls, plugins_dir: str | Path | None = None) -> PluginRegistry:
        """Built-ins, then installed packages (those named in PITLANE_LOAD where it is set), then files of a folder."""
        registry = cls()
        for module in BUILT_IN:
            registry._load(module.rpartition(".")[2], "built-in", lambda module=module: importlib.import_module(module))
        wanted = os.environ.get("PITLANE_LOAD")
        names = None if wanted is None else {name.strip() for name in wanted.split(",")}
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
        """Validate one class and enter it; a name that is taken is refused."""
        validate(plugin)
        if plugin.name in self.entries:
            raise ValueError(f"plugin name {plugin.name!r} is taken by {self.entries[plugin.name].source}")
        self.entries[plugin.name] = PluginEntry(plugin.name, source, plugin)
        return plugin

    def get(self, name: str) -> type[Plugin]:
        """The class of that name, or UnknownPlugin that lists the known (or says why it failed to load)."""
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownPlugin(f"unknown plugin {name!r}; known: {', '.join(sorted(self.togglable()))}")
        if entry.plugin is None:
            raise UnknownPlugin(f"plugin {name!r} ({entry.source}) did not load: {entry.reason}")
        return entry.plugin

    def togglable(self) -> list[str]:
        return [entry.name for entry in self.entries.values() if entry.plugin and not entry.serves_host]

    def __iter__(self) -> Iterator[PluginEntry]:
        return iter(sorted(self.entries.values(), key=lambda entry: entry.name))

    def first(self, hook: str, **arguments: Any) -> Any:
        """First non-None result of a host hook over all loaded plugins, by stage and name."""
        loaded = [entry.plugin for entry in self if entry.plugin and hook in entry.hooks]
        for plugin in sorted(loaded, key=lambda plugin: (plugin.stage, plugin.name)):
            function = getattr(plugin(), hook)
            result = function(*[arguments[name] for name in arguments_of(function)])
            if result is not None:
                return result
        return None

    def _load(self, name: str, source: str, load: Any) -> None:
        try:
            found = load()
            classes = _classes_of(found) if isinstance(found, ModuleType) else [found]
            if not classes:
                raise TypeError("it holds no Plugin class")
            for plugin in classes:
                self.add(plugin, source)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            entry = PluginEntry(name, source, None, f"{type(error).__name__}: {error}")
            log.warning("plugin %s (%s) did not load: %s", name, source, entry.reason)
            key = f"{name} ({source})" if name in self.entries else name  # what holds the name stays
            self.entries[key] = entry


def hooks_of(plugin: type[Plugin]) -> list[str]:
    """Names of the hooks that a class implements, in call order."""
    return [name for name in hookspecs.COMBINE if hasattr(getattr(plugin, name, None), "pitlane_impl")]


def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a bound hook implementation takes: all of its specification's arguments, or some."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


def validate(plugin: Any) -> None:
    """Raise with a reason if a class cannot be a plugin: name, role, exactness, options, hook names and arguments."""
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
    manager = pluggy.PluginManager("pitlane")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin.__new__(plugin), name)  # unused, so it is not initialised
    manager.check_pending()


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
