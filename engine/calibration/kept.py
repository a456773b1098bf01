"""The recipes on the disk: a list with sizes, deletion, and a limit for all recipes together.

A recipe is a folder `recipes/<plugin>-<digest>` in PITLANE_HOME. `ModelCalibrator` renews the time of a folder at every use. After
a build, the least recently used folders are deleted until all recipes take at most PITLANE_CACHE_GB (`cache_limit`). A folder that
was used in the last hour stays: another process may read or build it.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pitlane.engine.calibration.recipe import INFO
from pitlane.storage.home import CacheFolder, cache_folders, cache_limit, home, remove_folder, trim_cache

log = logging.getLogger("pitlane")
IN_USE = 3600.0  # seconds


class RecipeFolder(NamedTuple):
    """A recipe on the disk. model: '' while the build is unfinished. last_used: seconds since 1970."""

    name: str
    plugin: str
    model: str
    num_bytes: int
    last_used: float


def recipes_path() -> Path:
    return home() / "recipes"


def recipe_folders() -> list[RecipeFolder]:
    """All recipes, the most recently used first."""
    return [_recipe(folder) for folder in cache_folders(recipes_path())]


def remove_recipe(name: str) -> int:
    """Delete a recipe; return the number of bytes freed. 0 for an unknown name."""
    return remove_folder(recipes_path(), name)


def trim_recipes(keep: Path) -> None:
    """Delete the least recently used recipes until all take at most the limit. `keep` stays."""
    limit = cache_limit()

    def stays(folder: CacheFolder) -> bool:
        return folder.path.name == keep.name or time.time() - folder.last_used <= IN_USE

    for name in trim_cache(recipes_path(), limit, stays):
        log.warning("deleted the recipe %s: all recipes together reach the limit of %.1f GB", name, limit / 1e9)


def _recipe(folder: CacheFolder) -> RecipeFolder:
    name, model = folder.path.name, ""
    with suppress(OSError, ValueError, AttributeError):
        model = str(json.loads((folder.path / INFO).read_text(encoding="utf-8")).get("model", ""))
    return RecipeFolder(name, name.rpartition("-")[0], model, folder.num_bytes, folder.last_used)
