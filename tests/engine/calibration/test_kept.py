"""Recipes on the disk: listed with their sizes, deleted by name, bounded by a limit."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pitlane import PluginRegistry
from pitlane.engine.calibration.kept import recipe_folders, recipes_path, remove_recipe, trim_recipes
from pitlane.engine.models.registry import resolve
from pitlane.formats import calibrated
from pitlane.ui.cli import main

HOUR = 3600.0


def recipe(name: str, size: int, hours_ago: float, model: str = "tiny") -> Path:
    folder = recipes_path() / name
    folder.mkdir(parents=True)
    (folder / "layer-000.safetensors").write_bytes(bytes(size))
    if model:
        (folder / "recipe.json").write_text(json.dumps({"model": model}))
    moment = time.time() - hours_ago * HOUR
    os.utime(folder, (moment, moment))
    return folder


def test_the_least_recently_used_recipes_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITLANE_CACHE_GB", "0.0003")  # 300 kB
    oldest, second = recipe("gptq-1", 120_000, 9), recipe("awq-2", 120_000, 5)
    running = recipe("mixed-3", 120_000, 0.5, model="")
    newest = recipe("awq-4", 120_000, 20)
    trim_recipes(newest)
    assert not oldest.exists() and not second.exists(), "120 kB too much after the first deletion"
    assert running.exists(), "a process may still build it"
    assert newest.exists(), "the recipe that was just built"
    third = recipe("gptq-5", 30_000, 2)
    trim_recipes(newest)
    assert third.exists(), "below the limit, nothing is deleted"


def test_a_use_renews_the_time_and_a_deleted_recipe_is_built_again() -> None:
    source, registry = resolve("random:tiny"), PluginRegistry.load()
    settings = {"int8": {}, "smoothquant": {"tokens": 64}}
    calibrated(source, settings, registry)
    (kept,) = recipe_folders()
    assert (kept.plugin, kept.model) == ("smoothquant", "random:tiny") and kept.num_bytes > 1000
    os.utime(recipes_path() / kept.name, (0, 0))
    calibrated(source, settings, registry)
    assert time.time() - recipe_folders()[0].last_used < HOUR
    assert remove_recipe(kept.name) == kept.num_bytes and recipe_folders() == [] and remove_recipe("x") == 0
    calibrated(source, settings, registry)
    assert [folder.name for folder in recipe_folders()] == [kept.name]


def test_the_command_lists_and_deletes_recipes() -> None:
    recipe("gptq-abc", 50_000, 1)
    recipe("mixed-def", 10, 2, model="")
    listed = CliRunner().invoke(main, ["models", "ls"])
    lines = [line for line in listed.output.splitlines() if "recipe of" in line]
    assert len(lines) == 2 and "gptq-abc" in lines[0] and "recipe of gptq for tiny" in lines[0] and "50" in lines[0]
    assert "unfinished recipe of mixed" in lines[1]
    document = json.loads(CliRunner().invoke(main, ["models", "ls", "--json"]).output)
    assert [row["name"] for row in document["recipes"]] == ["gptq-abc", "mixed-def"]
    removed = CliRunner().invoke(main, ["models", "rm", "gptq-abc"])
    assert removed.exit_code == 0 and "removed gptq-abc, freed 50" in removed.output, removed.output
    assert [folder.name for folder in recipe_folders()] == ["mixed-def"]
