"""Reads the source of a plugin as text: the texts that its class bodies assign, such as `name` and `api_version`.

Imports no plugin, so it may read the source of a plugin that breaks every process that imports it. A class that a program makes
while it is imported is not seen.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

MAX_IMPORTS = 3  # from module to module, on the way to a class


def class_texts(module: str, class_name: str = "", depth: int = MAX_IMPORTS) -> list[dict[str, str]]:
    """Return a dictionary for every class of a module: names and values of the texts that its body assigns.

    module: dotted name, or the path of a file. class_name: only this class; if the module imports it from its own package, the
    class is read there. Empty if the source cannot be read.
    """
    path = _path_of(module)
    if path is None:
        return []
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and class_name in ("", node.name)]
    if class_name and not classes and depth:
        for node in tree.body:
            names = _imported(node, class_name)
            if isinstance(node, ast.ImportFrom) and names:
                source = _source_of(node, module, is_package=path.name == "__init__.py")
                is_own = source.partition(".")[0] == module.partition(".")[0]
                return class_texts(source, names[0], depth - 1) if is_own else []
    return [_texts_of(node) for node in classes]


def spec_of(module: str) -> ModuleSpec | None:
    """Where a module lies. Imports no plugin: at most the packages that hold the module."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module in sys.modules without a spec
        return PathFinder.find_spec(module)


def _imported(node: ast.stmt, class_name: str) -> list[str]:
    """The original name of a class, if the statement imports it."""
    if not isinstance(node, ast.ImportFrom):
        return []
    return [alias.name for alias in node.names if class_name == (alias.asname or alias.name)]


def _source_of(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The dotted name of the module that a `from ... import` of a module reads."""
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) + is_package - node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _texts_of(node: ast.ClassDef) -> dict[str, str]:
    """`name = "a"` and `name, exactness = "a", "identical"` in a class body, as a dictionary."""
    texts: dict[str, str] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        for target in targets:
            pairs: list[tuple[ast.expr, ast.expr | None]] = [(target, statement.value)]
            if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                pairs = list(zip(target.elts, statement.value.elts, strict=False))
            for variable, value in pairs:
                if isinstance(variable, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    texts[variable.id] = value.value
    return texts


def _path_of(module: str) -> Path | None:
    """The source file of a module. Imports nothing."""
    if module.endswith(".py"):
        return Path(module)
    package, *names = module.split(".")
    spec = spec_of(package) if package else None
    if spec is None or not names:
        return Path(spec.origin) if spec and spec.origin else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *names)
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None
