"""The folder for Pitlane's data: PITLANE_HOME, or else the platform's user data folder; and its caches, which have a limit.

A cache is a folder of folders. A use renews the time of a folder, so the least recently used folders can be deleted first.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import platformdirs

from pitlane.storage.errors import StorageError, reason_of

CACHE_LIMIT = "PITLANE_CACHE_GB"
CAP_BYTES = 8 * 2**30  # the limit of a cache without this variable


class CacheFolder(NamedTuple):
    """A folder of a cache. last_used: seconds since 1970."""

    path: Path
    num_bytes: int
    last_used: float


def home_path() -> Path:
    """Return the path of the data folder, which may be missing."""
    given = os.environ.get("PITLANE_HOME")
    return Path(given).expanduser() if given else platformdirs.user_data_path("pitlane", appauthor=False)


def home() -> Path:
    """Return the data folder. Create it if it is missing, readable by its owner only."""
    folder = home_path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else reason_of(error)
        raise StorageError(f"the data folder {folder} cannot be made ({reason}); set PITLANE_HOME to another") from None
    return folder.absolute()


def cache_limit(default: int = CAP_BYTES) -> int:
    """The limit in bytes for all recipes, and for all packed copies: PITLANE_CACHE_GB (10^9 bytes), or else `default`."""
    text = os.environ.get(CACHE_LIMIT, "")
    if not text.strip():
        return default
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise StorageError(f"{CACHE_LIMIT} must be a number of gigabytes above 0, got {text!r}; write {CACHE_LIMIT}=8")
    return int(limit * 1e9)


def cache_folders(cache: Path) -> list[CacheFolder]:
    """The folders of a cache, the most recently used first."""
    folders = [_folder(path) for path in cache.glob("*") if path.is_dir()]
    return sorted(folders, key=lambda folder: folder.last_used, reverse=True)


def remove_folder(cache: Path, name: str) -> int:
    """Delete a folder of a cache; return the number of bytes freed. 0 for an unknown name."""
    folder = next((folder for folder in cache_folders(cache) if folder.path.name == name), None)
    if folder is None:
        return 0
    shutil.rmtree(folder.path, ignore_errors=True)
    return folder.num_bytes


def trim_cache(cache: Path, limit: int, stays: Callable[[CacheFolder], bool]) -> list[str]:
    """Delete the least recently used folders until all take at most `limit` bytes; return their names."""
    folders, removed = cache_folders(cache), list[str]()
    total = sum(folder.num_bytes for folder in folders)
    for folder in reversed(folders):
        if total <= limit:
            break
        if not stays(folder):
            shutil.rmtree(folder.path, ignore_errors=True)
            total -= folder.num_bytes
            removed.append(folder.path.name)
    return removed


def _folder(path: Path) -> CacheFolder:
    size, used = 0, time.time()
    with suppress(OSError):  # another process has deleted the folder
        used = path.stat().st_mtime
    for file in path.glob("*"):
        with suppress(OSError):
            size += file.stat().st_size
    return CacheFolder(path, size, used)
