"""Finds the plugins of other packages and of files, without importing them.

A package names its plugins by entry points of the group `pitlane`; a folder holds one plugin file per `.py`. `PITLANE_LOAD`, if
set, names the packages to load. `pitlane plugins disable` keeps names in a file, so that it works if a plugin breaks every command
that loads plugins. Knows no plugin class, and imports neither pluggy nor pydantic.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from pitlane.engine.errors import BadOption, UnknownPlugin
from pitlane.engine.plan.source import class_texts, spec_of
from pitlane.storage.home import home, home_path

GROUP = "pitlane"
DISABLED = "disabled-plugins.txt"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that can be loaded. name: of its entry point or file, known before its class is.

    load: imports it, and returns a class or a module. distribution: None for a file. module: dotted name, or the path of a file.
    disabled: the reason if it is not to be loaded. attribute: the class in the module; empty for all classes.
    """

    name: str
    source: str
    load: Callable[[], object]
    distribution: importlib.metadata.Distribution | None = None
    module: str = ""
    disabled: str = ""
    attribute: str = ""

    def files(self) -> list[Path]:
        """The source files: of the package or the module of the plugin. Imports nothing."""
        if self.module.endswith(".py"):
            return [Path(self.module)]
        spec = spec_of(self.module.partition(".")[0]) if self.module else None
        if spec is None:
            return []
        folders = spec.submodule_search_locations
        if folders:
            return sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
        return [Path(spec.origin)] if spec.origin else []

    def api_version(self) -> str:
        """The version of the face that a plugin class declares, read as text. Empty if the source declares none."""
        return next((texts["api_version"] for texts in self._classes() if "api_version" in texts), "")

    def class_names(self) -> list[str]:
        """The names of the plugin classes, read as text. Empty if the source assigns no name."""
        return [texts["name"] for texts in self._classes() if "name" in texts]

    def _classes(self) -> list[dict[str, str]]:
        """The texts that the bodies of the plugin classes assign. Imports nothing.

        A plugin class is a class of the module that assigns `name`; without such a class, every class counts. If the entry point
        names a class, this class alone counts.
        """
        classes = class_texts(self.module, self.attribute) if self.module else []
        return [texts for texts in classes if "name" in texts] or classes

    def state(self) -> list[object]:
        """What a stored description of the plugin depends on: version, files, and whether it is disabled."""
        stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in self.files() if path.is_file()]
        return [self.name, self.source, self.module, self.disabled, disabled_names(), stats]


def find_plugins(plugins_dir: str | Path | None = None) -> Iterator[Candidate]:
    """The plugins of installed packages, then of the files of a folder (None: of PITLANE_PLUGINS_DIR)."""
    packages = os.environ.get("PITLANE_LOAD")
    names = None if packages is None else {name.strip() for name in packages.split(",")} - {""}
    disabled = disabled_names()
    for point in importlib.metadata.entry_points(group=GROUP) if names != set() else ():
        package = point.dist
        if package is None or (names is not None and package.name not in names):
            continue
        source = f"{package.name} {package.version}"
        module, _, attribute = (part.strip() for part in point.value.partition("[")[0].partition(":"))
        candidate = Candidate(point.name, source, point.load, package, module, attribute=attribute)
        yield replace(candidate, disabled=_disabled(disabled, candidate, package.name))
    folder = plugins_dir or os.environ.get("PITLANE_PLUGINS_DIR")
    if folder and not Path(folder).is_dir():
        raise BadOption(f"plugins folder {folder} is not a folder; make it, or leave --plugins-dir out")
    for path in sorted(Path(folder).glob("*.py")) if folder else ():
        candidate = Candidate(path.stem, str(path), partial(_import_file, path), None, str(path))
        yield replace(candidate, disabled=_disabled(disabled, candidate, str(path)))


def disabled_names() -> list[str]:
    """Names of the plugins, packages and files that `pitlane plugins disable` has disabled."""
    try:
        text = (home_path() / DISABLED).read_text(encoding="utf-8")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def disable_plugin(name: str, plugins_dir: str | Path | None = None) -> None:
    """Load a plugin no more: by the name of the plugin, its package or its file. Loads no plugin.

    plugins_dir: as for `find_plugins`. Raises BadOption for a built-in plugin, and UnknownPlugin for a name of no plugin.
    """
    names: dict[str, None] = {}
    for candidate in find_plugins(plugins_dir):
        holder = candidate.distribution.name if candidate.distribution else candidate.source
        names.update(dict.fromkeys([candidate.name, *candidate.class_names(), holder]))
    if name not in names:
        if name.isidentifier() and spec_of(f"pitlane.plugins.{name}"):
            raise BadOption(
                f"plugin {name} is built-in and cannot be disabled; leave it out of a plan: --plugins=-{name}"
            )
        known = ", ".join(sorted(names)) or "none; give the folder of a plugin file with --plugins-dir"
        raise UnknownPlugin(f"no package or file has a plugin {name!r}; known: {known}")
    _write_disabled([*(other for other in disabled_names() if other != name), name])


def enable_plugin(name: str) -> bool:
    """Load a disabled plugin again. Returns whether it was disabled. Loads no plugin."""
    names = disabled_names()
    _write_disabled([other for other in names if other != name])
    return name in names


def way_out(error: BaseException, candidate: Candidate) -> str:
    """The command that installs a missing module, or ''."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    missing = error.name.partition(".")[0]
    if missing in ("pitlane", candidate.module.partition(".")[0]):
        return ""
    requirement = missing.replace("_", "-")
    for text in (candidate.distribution.requires or ()) if candidate.distribution else ():
        name = re.split(r"[\s\[(<>=!~;]", text, maxsplit=1)[0]
        if name.lower().replace("_", "-").replace(".", "-") == requirement.lower():
            extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", text)
            wanted = text.partition(";")[0].strip()
            requirement = f"{candidate.distribution.name}[{extra[1]}]" if extra and candidate.distribution else wanted
    quoted = f"'{requirement}'" if re.search(r"[^\w.-]", requirement) else requirement
    return f"; install it: pip install {quoted}"


def disabled_reason(name: str) -> str:
    return f"disabled; to load it again: pitlane plugins enable {name}"


def _disabled(disabled: list[str], candidate: Candidate, holder: str) -> str:
    """The reason why a candidate is not loaded, or ''. holder: its package or file.

    A candidate is disabled by its name, by its holder, or by the names of all its classes.
    """
    if not disabled:
        return ""
    name = next((name for name in (candidate.name, holder) if name in disabled), None)
    classes = candidate.class_names() if name is None else []
    if classes and set(classes) <= set(disabled):
        name = classes[0]
    return disabled_reason(name) if name else ""


def _write_disabled(names: list[str]) -> None:
    (home() / DISABLED).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pitlane_file_{path.stem}", path)
    if not spec or not spec.loader:
        raise TypeError("a plugin is a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
