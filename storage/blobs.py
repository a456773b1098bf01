"""Tensor files: written whole or not at all, checksummed, read by mmap.

A file appears under its final name only when its bytes are on the disk: write under a temporary name in the same folder,
fsync, rename, fsync the folder. The checksum is the SHA-256 of the SHA-256 digests of 8 MiB pieces. Threads hash the
pieces in parallel, because hashlib releases the interpreter lock. Knows nothing of prefixes, rows or models.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pitlane.storage.errors import PrefixMismatch, StorageError, reason_of
from pitlane.storage.files import sync, sync_folder

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp"
_PIECE = 8 << 20
_SPARE_BYTES = 16 << 20  # space that a save leaves free for the database and its log
_STALE_SECONDS = 3600.0


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Total bytes of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write(folder: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write and sync a safetensors file under a temporary name; the caller then publishes or removes it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    needed, free = tensor_bytes(tensors) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"cannot save a prefix in {folder}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; "
            "free some disk space or remove saved prefixes"
        )
    path = folder / f"{os.getpid()}-{secrets.token_hex(6)}{TEMPORARY}"
    try:
        save_file(_unshared(tensors), path, metadata=metadata)
        sync(path)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise StorageError(f"cannot save a prefix in {folder}: {reason}") from error
        raise
    return path


def publish(written: Path, final: Path) -> None:
    """Rename a synced file to its final name, durably. It replaces an older file; readers of that file are not disturbed."""
    try:
        os.replace(written, final)
        sync_folder(final.parent)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {reason_of(error)}") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a file; return its tensors and its metadata. The tensors' bytes are read from the disk on first use."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PrefixMismatch(f"{path.name} cannot be read ({error})") from error


def checksum(path: Path) -> str:
    """Checksum of a file's bytes, computed by several threads."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:

            def digest(start: int) -> bytes:
                with view[start : start + _PIECE] as piece:
                    return hashlib.sha256(piece).digest()

            if size <= _PIECE:
                return hashlib.sha256(digest(0)).hexdigest()
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                return hashlib.sha256(b"".join(pool.map(digest, range(0, size, _PIECE)))).hexdigest()


def remove(path: Path) -> None:
    """Delete a file if it exists. A file that cannot be deleted now stays until the store is opened again."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # open in another process on Windows, or the folder has become read-only
        return


def temporary(path: Path) -> bool:
    """True for the temporary names of `write` (`....tmp`) and of safetensors (`.tmp...`)."""
    return path.name.endswith(TEMPORARY) or path.name.startswith(TEMPORARY)


def stale(path: Path) -> bool:
    """True for a file so old that no running save can still write to it."""
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except OSError:
        return False


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, and with separate storages, as safetensors requires."""
    pointers: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in pointers else tensor
        pointers.add(pointer)
    return result
