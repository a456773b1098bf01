"""A GGUF file as a model folder in Hugging Face format, decoded once and kept in the cache: `<home>/cache/gguf/<key>/`.

The folder holds config.json, generation_config.json, the files of the tokenizer, model.safetensors, and `gguf.json`: the GGUF files
that it was made of, and the sizes of its own files. The key is a hash of the content of the GGUF files, so a changed file gets a
new folder, and a moved file keeps its folder. A folder is written under a temporary name and renamed when it is complete, so no
process sees half of it; when two processes write it at once, the second result is dropped. A damaged folder is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf.conversion import Conversion
from pitlane.engine.models.gguf.reader import read, split_files
from pitlane.engine.models.gguf.stream import Progress, file_size, write
from pitlane.engine.models.weight_hashes import hashes, is_known, state_of
from pitlane.engine.models.weights import SINGLE
from pitlane.storage.errors import reason_of
from pitlane.storage.home import home

log = logging.getLogger("pitlane")
FORMAT = 1  # increase it when decoding or a written file changes: all folders are made again
RECORD = "gguf.json"
TEMPORARY = ".tmp-"
STALE_SECONDS = 3600.0  # a temporary folder without a write for so long is left over from a process that was killed
SPARE_BYTES = 2**25  # that stay free on the disk, for the tokenizer's files and others


def open_gguf(file: Path, progress: Progress | None = None) -> Path:
    """Return the model folder of a GGUF file, or of the first file of a split. Decodes the file if there is no folder yet.

    progress: called with the bytes decoded so far and in all. None: a line in the log says what is decoded. Raises ModelError.
    """
    files = split_files(file)
    states = {part: state_of(part) for part in files}
    # hashing a large file takes seconds: an unknown file is checked first
    conversion = None if is_known(states) else Conversion.of(read(file))
    digests = hashes(states)
    folder = _folder_of(digests)
    if not _is_complete(folder):
        _make(conversion or Conversion.of(read(file)), folder, digests, progress or _log_line(files))
        if {part: state_of(part) for part in files} != states:
            shutil.rmtree(folder, ignore_errors=True)
            raise ModelError(f"{file} changed while it was decoded; open it again when it is complete")
    return folder


def is_decoded(file: Path) -> bool:
    """Whether `open_gguf` finds the model folder of a file, and need not decode it."""
    try:
        states = {part: state_of(part) for part in split_files(file)}
    except ModelError:
        return False
    return is_known(states) and _is_complete(_folder_of(hashes(states)))


def _folder_of(digests: list[str]) -> Path:
    """The folder of the GGUF files with these hashes."""
    return home() / "cache" / "gguf" / hashlib.sha256(f"{FORMAT} {' '.join(digests)}".encode()).hexdigest()[:32]


def _log_line(files: tuple[Path, ...]) -> Progress:
    megabytes = sum(part.stat().st_size for part in files) / 1e6
    log.warning("decoding %s, %.0f MB, once", files[0].name, megabytes)  # the command line shows warnings only
    return lambda done, total: None


def _make(conversion: Conversion, folder: Path, digests: list[str], progress: Progress) -> None:
    """Write the folder. Leaves nothing behind if it fails or is interrupted."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        _check_space(conversion.model.files[0], cache, file_size(conversion.jobs, conversion.dtype))
        partial = cache / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}"
        try:
            partial.mkdir()
            _fill(partial, conversion, digests, progress)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{conversion.model.files[0]} cannot be decoded into {cache}: {reason_of(error)}") from error


def _fill(folder: Path, conversion: Conversion, digests: list[str], progress: Progress) -> None:
    from pitlane.engine.text.gguf_tokenizer import write_tokenizer

    model = conversion.model
    _write_json(folder / "config.json", conversion.config)
    _write_json(folder / "generation_config.json", conversion.generation)
    # before the weights: a tokenizer that is not supported is refused before minutes of work
    try:
        write_tokenizer(model.metadata, folder)
    except ModelError as error:
        raise type(error)(f"{model.files[0]}: {error}") from None
    write(conversion.jobs, conversion.dtype, folder / SINGLE, progress)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    files = [str(part.absolute()) for part in model.files]
    _write_json(folder / RECORD, {"files": files, "sha256": digests, "sizes": sizes})
    for path in folder.iterdir():
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _publish(partial: Path, folder: Path) -> None:
    """Rename a complete folder. A damaged folder gives way; a complete folder of another process stays."""
    if folder.exists() and not _is_complete(folder):
        damaged = partial.with_name(partial.name + "-damaged")
        with suppress(OSError):  # another process was first
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _is_complete(folder: Path) -> bool:
    """Whether all files of a folder are there and have their sizes."""
    try:
        sizes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _remove_stale(cache: Path) -> None:
    for partial in cache.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            last_write = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - last_write > STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _check_space(file: Path, cache: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < num_bytes + SPARE_BYTES:
        raise ModelError(
            f"{file} cannot be decoded: it needs {num_bytes / 1e6:,.0f} MB in {cache}, {free / 1e6:,.0f} MB are free; "
            "free some space, or set PITLANE_HOME to a folder on another disk"
        )
