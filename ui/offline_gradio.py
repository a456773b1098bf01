"""Gradio that sends nothing to other machines and writes nothing into its own package. Page modules import `gr` from here.

Gradio reads these environment variables while it is imported. They replace the values that the user has set.

At every import, Gradio writes or compares a stub file for each of its components. This takes 1.7 of the 3.7 seconds of the import
(one core), and only type checkers read the stubs. The import here leaves it out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_SHARE"] = "False"


class _WithoutStubs(SourceFileLoader):
    """Loads `gradio.component_meta`, and replaces its function for stubs by a function that does nothing."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.create_or_modify_pyi = lambda *arguments: None  # type: ignore[attr-defined]


class _ComponentMeta(MetaPathFinder):
    """Finds `gradio.component_meta` alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "gradio.component_meta" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _WithoutStubs(spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def _stubs_left_out() -> Iterator[None]:
    finder = _ComponentMeta()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with _stubs_left_out():
    import gradio as gr

__all__ = ["gr"]
