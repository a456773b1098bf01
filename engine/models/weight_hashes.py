"""SHA-256 of weight files, each read once: known ones come from a cache in the home, by the state of the file.

A date of change can be set back (`cp -p`, `rsync -t`, `touch -d`). So the state of a file also has the time at which the system saw
its last change, which a user cannot set, and a checksum of 16 pieces of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home

PIECES, PIECE = 16, 4096  # bytes of a file that are read on every start


def state_of(file: Path) -> str:
    """A text that changes when the file is written: path, size, times and a checksum of 16 pieces of it."""
    try:
        with open(file, "rb") as handle:
            stat = os.fstat(handle.fileno())
            digest = hashlib.sha256()
            for piece in range(PIECES):
                handle.seek(max(0, stat.st_size - PIECE) * piece // (PIECES - 1))
                digest.update(handle.read(PIECE))
    except OSError as error:
        raise _unreadable(file, error) from None
    return f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{digest.hexdigest()[:16]}"


def hashes(states: Mapping[Path, str]) -> list[str]:
    """SHA-256 of each file, given its state."""
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, AttributeError, RecursionError, StorageError):  # unreadable: as good as none
        found = json.loads(_cache().read_text(encoding="utf-8"))
        known = {key: value for key, value in found.items() if isinstance(value, str)}
    before = len(known)
    for file, state in states.items():
        if state not in known:
            known[state] = _sha256(file)
    if len(known) > before:
        with suppress(OSError, StorageError):  # one that cannot be written is done without
            _replace(_cache(), json.dumps(known))
    return [known[state] for state in states.values()]


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> ModelError:
    return ModelError(f"{file} cannot be read ({error.strerror}); restore it or download it again")


def _cache() -> Path:
    return home() / "cache" / "weight_hashes.json"


def _replace(file: Path, text: str) -> None:
    """Write a file in one step, so that no reader sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as handle:
        partial = Path(handle.name)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:  # a full disk, at every start
        partial.unlink(missing_ok=True)
        raise
