"""Fixtures for tests of plugin packages. pytest loads them wherever Pitlane is installed (entry point `pytest11`).

Importing this module imports neither torch nor an engine: a fixture imports what it needs when a test asks for it. No fixture is
used without being named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pitlane import Engine, Plugin, PluginRegistry


@pytest.fixture
def pitlane_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PITLANE_HOME, no network, no PITLANE_* setting of the user, and no installed plugin package."""
    for name in [name for name in os.environ if name.startswith("PITLANE_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "pitlane-home"
    monkeypatch.setenv("PITLANE_HOME", str(home))
    monkeypatch.setenv("PITLANE_LOAD", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.fixture
def pitlane_registry(pitlane_home: Path) -> PluginRegistry:
    """The built-in plugins alone. A test adds a class with `registry.add(MyPlugin)`."""
    from pitlane import PluginRegistry

    return PluginRegistry.load()


@pytest.fixture
def pitlane_engine(pitlane_registry: PluginRegistry) -> Iterator[Callable[..., Engine]]:
    """Engines over a tiny model of random weights with a tokenizer of bytes, closed at the end.

    `pitlane_engine(MyPlugin, OtherPlugin, dtype="float64", **options)` adds the classes to the registry. The default plan is
    empty: use `engine.plan({"my_plugin": {}})`.
    """
    from pitlane import Engine

    engines: list[Engine] = []

    def make(*plugins: type[Plugin], model: str = "random:tiny", dtype: str = "float64", **options: Any) -> Engine:
        for plugin in plugins:
            if plugin not in [entry.plugin for entry in pitlane_registry]:
                pitlane_registry.add(plugin)
        settings = {"plugins": {}, "registry": pitlane_registry, **options}
        engines.append(Engine(model, dtype=dtype, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
