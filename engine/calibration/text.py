"""The calibration text: a file of the user, or the text in Pitlane (storage/calibration.txt, 74 kB, written for Pitlane)."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from pitlane.engine.errors import BadOption


def calibration_text(name: str) -> str:
    """The text of a file; for an empty name, the text in Pitlane. Raises BadOption."""
    if not name:
        return files("pitlane.storage").joinpath("calibration.txt").read_text(encoding="utf-8")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadOption(
            f"the calibration text {name[:200]!r} cannot be read ({reason}); name a file of plain UTF-8 text"
        ) from None


def calibration_hash(name: str) -> str:
    """SHA-256 of a calibration text, for the key of a plugin that has an option for it."""
    return hashlib.sha256(calibration_text(name).encode()).hexdigest()
