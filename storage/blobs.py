"""Tensor files: written whole or not at all, checksummed, read by mmap.

A file appears under its name only when its bytes are on the disk: temporary name in the same folder, fsync, rename,
fsync of the folder. The checksum is SHA-256 over the SHA-256 digests of 8 MiB pieces, so that cores share the work;
hashlib lets go of the interpreter lock. Knows nothing of prefixes, rows or models. torch is imported where it is used.
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

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp"
_PIECE = 8 << 20
_SPARE_BYTES = 16 << 20  # room left for the database and its log
_STALE_SECONDS = 3600.0


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the tensors' values take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write(folder: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write one safetensors file under a temporary name, synced; the caller publishes or deletes it."""
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
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise StorageError(f"cannot save a prefix in {folder}: {reason}") from error
        raise
    return path


def publish(written: Path, final: Path) -> None:
    """Give a synced file its name, durably; a file of that name is replaced, its readers keep the old one."""
    try:
        os.replace(written, final)
        sync_folder(final.parent)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {reason_of(error)}") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a file; return its tensors, whose pages are read when touched, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PrefixMismatch(f"{path.name} cannot be read ({error})") from error


def checksum(path: Path) -> str:
    """Checksum of a file's bytes, by several threads."""
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


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file if it is there; one that cannot be deleted now is left for the next cleaning."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # open elsewhere on Windows, or a folder that became read-only
        return


def temporary(path: Path) -> bool:
    """True for a name that `write` uses, or safetensors below it: it writes to `.tmp...` and renames."""
    return path.name.endswith(TEMPORARY) or path.name.startswith(TEMPORARY)


def stale(path: Path) -> bool:
    """True for a file so old that no running save can still be writing it."""
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except OSError:
        return False


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, each with storage of its own, as safetensors asks."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return result
