"""The folder for Pitlane's data: PITLANE_HOME, or else the platform's user data folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from pitlane.storage.errors import StorageError, reason_of


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
