"""Fixtures for the tests of plugin packages. If Pitlane is installed, pytest loads them (entry point `pytest11`).

This module imports neither torch nor an engine: a fixture imports them when a test uses it. No fixture is automatic: a test names
the fixtures that it uses.
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
    """An empty PITLANE_HOME, without the network, the user's PITLANE_* settings, and installed plugin packages."""
    for name in [name for name in os.environ if name.startswith("PITLANE_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "pitlane-home"
    monkeypatch.setenv("PITLANE_HOME", str(home))
    monkeypatch.setenv("PITLANE_LOAD", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.fixture
def pitlane_registry(pitlane_home: Path) -> PluginRegistry:
    """A registry of the built-in plugins. A test adds a class with `pitlane_registry.add(MyPlugin)`."""
    from pitlane import PluginRegistry

    return PluginRegistry.load()


@pytest.fixture
def pitlane_engine(pitlane_registry: PluginRegistry) -> Iterator[Callable[..., Engine]]:
    """A function that makes engines of a tiny model, with random weights and a byte tokenizer. The test's end closes them.

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
