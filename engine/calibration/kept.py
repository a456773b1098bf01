"""The recipes on the disk: a list with sizes, deletion, and a limit for all recipes together.

A recipe is a folder `recipes/<plugin>-<digest>` in PITLANE_HOME. `ModelCalibrator` renews the time of a folder at every use. After
a build, the least recently used folders are deleted until all recipes take at most PITLANE_CACHE_GB (`CAP_BYTES` without this
variable). A folder that was used in the last hour stays: another process may read or build it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pitlane.engine.calibration.recipe import INFO
from pitlane.storage.home import cache_limit, home

log = logging.getLogger("pitlane")
CAP_BYTES = 8 * 2**30
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
    folders = [_folder(path) for path in recipes_path().glob("*") if path.is_dir()]
    return sorted(folders, key=lambda folder: folder.last_used, reverse=True)


def remove_recipe(name: str) -> int:
    """Delete a recipe; return the number of bytes freed. 0 for an unknown name."""
    folders = {folder.name: folder for folder in recipe_folders()}
    if name not in folders:
        return 0
    shutil.rmtree(recipes_path() / name, ignore_errors=True)
    return folders[name].num_bytes


def trim_recipes(keep: Path) -> None:
    """Delete the least recently used recipes until all take at most the limit. `keep` stays."""
    folders, limit = recipe_folders(), cache_limit(CAP_BYTES)
    total = sum(folder.num_bytes for folder in folders)
    for folder in reversed(folders):
        if total <= limit:
            return
        if folder.name != keep.name and time.time() - folder.last_used > IN_USE:
            total -= remove_recipe(folder.name)
            log.warning(
                "deleted the recipe %s: all recipes together reach the limit of %.1f GB", folder.name, limit / 1e9
            )


def _folder(path: Path) -> RecipeFolder:
    model, size, used = "", 0, time.time()
    with suppress(OSError, ValueError, AttributeError):
        model = str(json.loads((path / INFO).read_text(encoding="utf-8")).get("model", ""))
    with suppress(OSError):  # another process has deleted it
        used = path.stat().st_mtime
        size = sum(file.stat().st_size for file in path.iterdir())
    return RecipeFolder(path.name, path.name.rpartition("-")[0], model, size, used)
