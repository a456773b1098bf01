"""All plugins by name: built-in modules, installed packages, loose files (`finder.py` finds them).

A plugin that fails to import or to validate stops no other plugin: its entry has a status and the reason. Nothing is registered
globally: a planner takes classes from a registry and makes its own instances.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from pitlane.engine.errors import PlanConflict, UnknownPlugin
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families
from pitlane.engine.plan import trace
from pitlane.engine.plan.finder import Candidate, disabled_names, disabled_reason, find_plugins, way_out
from pitlane.engine.plan.hooks import Check, Fail, Hook, HookError, call
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.import_watch import watched
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.suspension import Suspensions
from pitlane.engine.plan.validation import Incompatible, check_api, hooks_of, validate

log = logging.getLogger("pitlane")
Status: TypeAlias = Literal["ok", "disabled", "failed", "incompatible"]

BUILT_IN_SOURCE = "built-in"
BUILT_IN = (
    "pitlane.plugins.prefix_cache",
    "pitlane.plugins.lora",
    "pitlane.plugins.packed_checkpoint",
    "pitlane.plugins.packed_linear",
    "pitlane.plugins.int8",
    "pitlane.plugins.int4",
    "pitlane.plugins.fp8",
    "pitlane.plugins.gptq",
    "pitlane.plugins.mixed",
    "pitlane.plugins.awq",
    "pitlane.plugins.smoothquant",
    "pitlane.plugins.few_bits",
    "pitlane.plugins.flash_attention",
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
    """A plugin and its source: `built-in`, `<distribution> <version>` or a file.

    status: `ok`; `disabled` by `pitlane plugins disable`; `failed` to load, or suspended after repeated failures; `incompatible`
    with this version of the face. reason: for any status but `ok`. notes: faults that stop no plugin, such as an import that
    changed the process.
    """

    name: str
    source: str
    plugin: type[Plugin] | None = None
    reason: str = ""
    status: Status = "ok"
    notes: list[str] = field(default_factory=list)

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
        self.suspensions = Suspensions(self._suspended)
        self._warned: set[str] = set()  # former names

    @classmethod
    def load(cls, plugins_dir: str | Path | None = None) -> PluginRegistry:
        """Load built-in plugins, installed packages, then files of a folder. PITLANE_LOAD, if set, names the packages to load."""
        registry = cls()
        for module in BUILT_IN:
            load = partial(importlib.import_module, module)
            registry._load(Candidate(module.rpartition(".")[2], BUILT_IN_SOURCE, load))
        for candidate in find_plugins(plugins_dir):
            registry._load(candidate)
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
        entry = self.entries.get(name) or self._renamed(name)
        if entry is None:
            failed = [f"{other.name} ({other.reason})" for other in self if other.plugin is None]
            not_loaded = f"; not loaded: {', '.join(failed)}" if failed else ""
            raise UnknownPlugin(f"unknown plugin {name!r}; known: {', '.join(sorted(self.togglable()))}{not_loaded}")
        if entry.plugin is None:
            raise UnknownPlugin(f"plugin {name!r} ({entry.source}) did not load: {entry.reason}")
        return entry.plugin

    def _renamed(self, name: str) -> PluginEntry | None:
        """The plugin that had a name before."""
        for entry in self.entries.values():
            if entry.plugin and name in entry.plugin.former_names:
                if name not in self._warned:
                    log.warning("plugin %s is now called %s; use the new name", name, entry.name)
                self._warned.add(name)
                return entry
        return None

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

    def _load(self, candidate: Candidate) -> None:
        name, source = candidate.name, candidate.source
        if candidate.disabled:
            self._keep(PluginEntry(name, source, None, candidate.disabled, "disabled"))
            return
        try:
            check_api(name, candidate.api_version())
            if trace.IS_ON:
                trace.print_load(name, source)
            loaded, notes = _imported(candidate)
            classes: list[Any] = [*_classes_of(loaded)] if isinstance(loaded, ModuleType) else [loaded]
            if not classes:
                raise TypeError("it holds no Plugin class")
            disabled = disabled_names() if source != BUILT_IN_SOURCE else []
            for plugin in classes:
                class_name = getattr(plugin, "name", None)
                if class_name in disabled:
                    self._keep(PluginEntry(class_name, source, None, disabled_reason(class_name), "disabled"))
                else:
                    self.add(plugin, source)
                    self._note(self.entries[plugin.name], notes)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            status: Status = "incompatible" if isinstance(error, Incompatible) else "failed"
            reason = f"{type(error).__name__}: {error}{way_out(error, candidate)}"
            log.warning("plugin %s (%s) did not load: %s", name, source, reason)
            self._keep(PluginEntry(name, source, None, reason, status))

    def _note(self, entry: PluginEntry, import_notes: list[str]) -> None:
        entry.notes = [f"its import {note}" for note in import_notes]
        if entry.plugin and not entry.hooks and not entry.plugin.requires:
            entry.notes.append(
                "it has no hook, so it changes nothing; write @hookimpl above the methods that are hooks"
            )
        for note in entry.notes:
            log.warning("plugin %s (%s): %s", entry.name, entry.source, note)

    def _suspended(self, name: str, reason: str) -> None:
        entry = self.entries.get(name)
        if entry is not None:
            entry.status, entry.reason = "failed", reason

    def _keep(self, entry: PluginEntry) -> None:
        """Add the entry of a plugin that did not load. The entry that has its name stays."""
        self.entries[f"{entry.name} ({entry.source})" if entry.name in self.entries else entry.name] = entry


def check_roles(plugins: Sequence[type[Plugin]]) -> None:
    """Refuse two plugins of one role."""
    holders: dict[str, str] = {}
    for plugin in plugins:
        holder = holders.setdefault(plugin.role, plugin.name) if plugin.role else plugin.name
        if holder != plugin.name:
            raise PlanConflict(f"{plugin.role} is held by {holder}; take it out to enable {plugin.name}")


def _imported(candidate: Candidate) -> tuple[object, list[str]]:
    """Import a plugin. Returns its class or module, and the side effects of its import."""
    if candidate.source == BUILT_IN_SOURCE:
        return candidate.load(), []
    with watched(candidate.name, candidate.source) as notes:
        loaded = candidate.load()
    return loaded, notes


def _raise_cause(error: HookError) -> None:
    raise error.__cause__ or error


def _classes_of(module: ModuleType) -> list[type[Plugin]]:
    members = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Plugin)]
    return [value for value in members if value.__module__ == module.__name__]
