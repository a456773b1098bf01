"""SHA-256 of weight files. A cache in the data folder keeps the hash of each known state of a file, so it is read once.

A user can set a file's modification time back (`cp -p`, `rsync -t`, `touch -d`). So the state also has the file's
ctime, which a user cannot set, and a checksum of 16 pieces of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.storage.errors import StorageError
from pitlane.storage.files import write_whole
from pitlane.storage.home import home

NUM_PIECES, PIECE_BYTES = 16, 4096  # read at every start


def state_of(file: Path) -> str:
    """A text that changes when the file is written: path, size, times and a checksum of 16 pieces."""
    try:
        with open(file, "rb") as handle:
            stat = os.fstat(handle.fileno())
            digest = hashlib.sha256()
            for piece in range(NUM_PIECES):
                handle.seek(max(0, stat.st_size - PIECE_BYTES) * piece // (NUM_PIECES - 1))
                digest.update(handle.read(PIECE_BYTES))
    except OSError as error:
        raise _unreadable(file, error) from None
    return f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{digest.hexdigest()[:16]}"


def file_hash(file: Path) -> str:
    """SHA-256 of one file. Reads the whole file only if its state is not known yet."""
    return hashes({file: state_of(file)})[0]


def hashes(states: Mapping[Path, str]) -> list[str]:
    """SHA-256 of each file. states: file -> its `state_of`."""
    known = _read_cache()
    num_cached = len(known)
    for file, state in states.items():
        if state not in known:
            known[state] = _sha256(file)
    if len(known) > num_cached:
        with suppress(OSError, StorageError):  # without a cache, the next start reads the files again
            _cache().parent.mkdir(parents=True, exist_ok=True)
            write_whole(_cache(), json.dumps(known))
    return [known[state] for state in states.values()]


def is_known(states: Mapping[Path, str]) -> bool:
    """Whether the cache has the hashes of all files."""
    return _read_cache().keys() >= set(states.values())


def _read_cache() -> dict[str, str]:
    """State of a file -> its hash. An unreadable cache counts as empty."""
    with suppress(OSError, ValueError, AttributeError, RecursionError, StorageError):
        cache = json.loads(_cache().read_text(encoding="utf-8"))
        return {key: value for key, value in cache.items() if isinstance(value, str)}
    return {}


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
