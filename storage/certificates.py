"""Certificates of plugins: the last outcome of `pitlane plugins check` for every plugin, as JSON files in PITLANE_HOME.

A certificate is valid for one source (distribution and version) of a plugin, the code of its files, and one version of Pitlane.
`load` returns None for any other certificate, and for a file that it cannot read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pitlane.storage.files import write_whole
from pitlane.storage.home import home

FOLDER = "certificates"


def save(name: str, record: dict[str, Any]) -> Path:
    """Write the certificate of a plugin; it replaces the former certificate."""
    folder = home() / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{_checked(name)}.json"
    write_whole(path, json.dumps(record, indent=1))
    return path


def load(name: str, source: str, version: str, code: str) -> dict[str, Any] | None:
    """Return the certificate of a plugin from this source, with this hash of its code, under this version of Pitlane, or None."""
    record = latest(name)
    if record is None or (record.get("source"), record.get("pitlane"), record.get("code")) != (source, version, code):
        return None
    return record


def latest(name: str) -> dict[str, Any] | None:
    """Return the last certificate of a plugin, valid or not; None without a readable file."""
    try:
        record = json.loads((home() / FOLDER / f"{_checked(name)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _checked(name: str) -> str:
    """Return the name of a plugin. Raises ValueError for other texts: the name becomes a file name."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"{name!r} is not the name of a plugin")
    return name
