"""The folder for Pitlane's data: PITLANE_HOME, or else the platform's user data folder; and the limit of its caches."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from pitlane.storage.errors import StorageError, reason_of

CACHE_LIMIT = "PITLANE_CACHE_GB"


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


def cache_limit(default: int) -> int:
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
