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
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from pitlane.engine.errors import BadOption
from pitlane.storage.home import home, home_path

GROUP = "pitlane"
DISABLED = "disabled-plugins.txt"
_API_LINE = re.compile(r"""^\s+api_version\s*(?::[^=]*)?=\s*["'](\d+\.\d+)["']""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that can be loaded. name: of its entry point or file, known before its class is.

    load: imports it, and returns a class or a module. distribution: None for a file. module: dotted name, or the path of a file.
    disabled: the reason if it is not to be loaded.
    """

    name: str
    source: str
    load: Callable[[], object]
    distribution: importlib.metadata.Distribution | None = None
    module: str = ""
    disabled: str = ""

    def files(self) -> list[Path]:
        """The source files: of the package or the module of the plugin. Imports nothing."""
        if self.module.endswith(".py"):
            return [Path(self.module)]
        spec = _spec(self.module.partition(".")[0]) if self.module else None
        if spec is None:
            return []
        folders = spec.submodule_search_locations
        if folders:
            return sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
        return [Path(spec.origin)] if spec.origin else []

    def api_version(self) -> str:
        """The version of the face that the source declares, read as text. Empty if it declares none, or cannot be read."""
        for path in self.files() if self.module else ():
            try:
                match = _API_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
            except OSError:
                continue
            if match:
                return match[1]
        return ""

    def state(self) -> list[object]:
        """What a stored description of the plugin depends on: version, files, and whether it is disabled."""
        stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in self.files() if path.is_file()]
        return [self.name, self.source, self.module, self.disabled, stats]


def find_plugins(plugins_dir: str | Path | None = None) -> Iterator[Candidate]:
    """The plugins of installed packages, then of the files of a folder (None: of PITLANE_PLUGINS_DIR)."""
    packages = os.environ.get("PITLANE_LOAD")
    names = None if packages is None else {name.strip() for name in packages.split(",")} - {""}
    disabled = disabled_names()
    for point in importlib.metadata.entry_points(group=GROUP) if names != set() else ():
        package = point.dist
        if package is None or (names is not None and package.name not in names):
            continue
        reason = _disabled(disabled, point.name, package.name)
        source = f"{package.name} {package.version}"
        yield Candidate(point.name, source, point.load, package, point.value.partition(":")[0].strip(), reason)
    folder = plugins_dir or os.environ.get("PITLANE_PLUGINS_DIR")
    if folder and not Path(folder).is_dir():
        raise BadOption(f"plugins folder {folder} is not a folder; make it, or leave --plugins-dir out")
    for path in sorted(Path(folder).glob("*.py")) if folder else ():
        reason = _disabled(disabled, path.stem, str(path))
        yield Candidate(path.stem, str(path), partial(_import_file, path), None, str(path), reason)


def disabled_names() -> list[str]:
    """Names of the plugins, packages and files that `pitlane plugins disable` has disabled."""
    try:
        text = (home_path() / DISABLED).read_text(encoding="utf-8")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def disable_plugin(name: str) -> None:
    """Load a plugin no more: by the name of the plugin, its package or its file. Loads no plugin."""
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


def _disabled(disabled: list[str], *names: str) -> str:
    name = next((name for name in names if name in disabled), None)
    return f"disabled; to load it again: pitlane plugins enable {name}" if name else ""


def _write_disabled(names: list[str]) -> None:
    (home() / DISABLED).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _spec(package: str) -> ModuleSpec | None:
    """Where a top-level module lies. Imports nothing."""
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError: a module in sys.modules without a spec
        return PathFinder.find_spec(package)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pitlane_file_{path.stem}", path)
    if not spec or not spec.loader:
        raise TypeError("a plugin is a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
