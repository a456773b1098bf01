"""Imports run one way: kernels, storage < engine < api < plugins, training < ui. Any other edge fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "api": "",
    "engine": "engine",
    "plugins": "plugins",
    "kernels": "kernels",
    "storage": "storage",
    "training": "training",
    "export": "export",
    "ui": "ui",
}
ALLOWED = {
    "kernels": {"kernels"},
    "storage": {"storage"},
    "engine": {"engine", "storage.types", "storage.errors", "storage.files", "storage.home"},
    "api": {"", "engine", "storage.types", "storage.errors", "testing"},
    "plugins": {"", "kernels", "storage", "plugins"},
    "export": {"", "models", "formats", "kernels", "storage", "export"},
    "training": {"", "kernels", "storage", "training", "export"},
    "ui": {"", "models", "sources", "formats", "testing", "plugins", "kernels", "storage", "training", "export", "ui"},
    "examples": {"", "models", "testing", "training"},
}
FILES = [path for room in ALLOWED for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts]


def is_module(name: str) -> bool:
    """Whether `pitlane.<room>.…` is a module of its own, not a name in one."""
    path = ROOT.joinpath(*name.split(".")[1:])
    return name.startswith("pitlane.") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def imported(path: Path) -> set[str]:
    """Names below `pitlane` that a file imports: `engine.pool`, '' for the face."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [
                f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")
            ]
            names = submodules if len(submodules) == len(node.names) else [node.module or "", *submodules]
        modules |= {name.removeprefix("pitlane").removeprefix(".") for name in names if name.split(".")[0] == "pitlane"}
        bare = {name.split(".")[0] for name in names} & (set(ROOMS) - {"api"})
        assert not bare, f"{path}: import {bare} as pitlane.<room>"
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        ok = any(name == allowed or (allowed and name.startswith(allowed + ".")) for allowed in ALLOWED[room])
        assert ok, f"{path.relative_to(ROOT)} may not import pitlane.{name}"


def installed() -> dict[str, Path]:
    """Installed modules by name below `pitlane`; '' is the face."""
    result = {}
    for room, folder in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py") if folder else (ROOT / room).rglob("*.py"):
            parts = [*([folder] if folder else []), *path.relative_to(ROOT / (folder or room)).with_suffix("").parts]
            result[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return result


def test_there_is_no_import_cycle() -> None:
    """Imports for type checkers and inside functions count too. The face names its own members, so it is left out."""
    paths = {name: path for name, path in installed().items() if name}
    edges = {name: imported(path) & set(paths) - {name} for name, path in paths.items()}
    assert len(edges) > 150 and edges["engine.engine"] >= {"engine.loop", "engine.lanes"}
    TopologicalSorter(edges).prepare()  # raises CycleError, which names the cycle


def test_the_engine_names_no_plugin() -> None:
    """Apart from the list of built-in modules: a plugin is known by its hooks alone.

    `quantization_config` of a checkpoint names formats, and two plugins have the names of such formats.
    """
    formats = {"awq", "gptq", "fp8"}
    names = [path.stem for path in (ROOT / "plugins").glob("*.py") if path.stem != "__init__"] + ["prefix_cache"]
    for path in (ROOT / "engine").rglob("*.py"):
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        is_reader = path.parent == ROOT / "engine" / "models" / "quantized"
        named = [name for name in names if name in strings and not (is_reader and name in formats)]
        assert not named, f"{path.relative_to(ROOT)} names {named}"


def test_optimisations_do_not_import_each_other() -> None:
    for path in (ROOT / "plugins").glob("*.py"):
        others = [name for name in imported(path) if name.startswith("plugins.")]
        assert not others, f"{path.name} imports {others}; what is shared belongs on the face"


@pytest.mark.parametrize(
    "module", ["pitlane", "pitlane.sources", "pitlane.engine.plan.registry", "pitlane.engine.plan.plan"]
)
def test_importing_the_face_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_all_plugins_imports_no_torch() -> None:
    code = (
        "import sys; from pitlane.engine.plan.registry import PluginRegistry; r = PluginRegistry.load(); "
        "print([(e.name, e.reason) for e in r if not e.plugin]); sys.exit('torch' in sys.modules or any(not e.plugin for e in r))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
