"""Copies of packed weights on the disk, so that a model in 8 or 4 bits loads without packing.

A part has the file `<home>/cache/packed/<key>/<part>.safetensors`. The key is a digest of the weights' fingerprint and of a recipe:
a text that names the way of packing. A file is written under a temporary name and renamed. Its metadata hold the SHA-256 of its
tensors. A file with another SHA-256 is deleted, and the log says so. If all folders together take more than PITLANE_CACHE_GB
(`cache_limit`), the least recently used folders are deleted. A folder that reaches the limit takes no more parts; they are packed
at every load. Small parts have no copy: packing takes less time than opening a file. Knows no layout and no model.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pitlane.storage import blobs
from pitlane.storage.errors import StorageError
from pitlane.storage.home import CacheFolder, cache_folders, cache_limit, home, remove_folder, trim_cache

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pitlane")
FORMAT = 1  # increase it when a layout changes: all copies are made again
SMALLEST_BYTES = 2**16  # smaller parts have no copy
DIGEST, RECIPE = "sha256", "recipe"


class PackedFolder(NamedTuple):
    """The copies of one model and recipe. name: its folder. last_used: seconds since 1970."""

    name: str
    recipe: str
    num_bytes: int
    last_used: float


class PackedCopies:
    """The copies of the packed parts of one model. fingerprint: of its weights. recipe: the way of packing, as a readable text."""

    def __init__(self, fingerprint: str, recipe: str) -> None:
        key = hashlib.sha256(f"{FORMAT} {fingerprint} {recipe}".encode()).hexdigest()[:32]
        self.recipe, self.folder = recipe, _root() / key

    def load(self, part: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a part, mapped from its file; None if there is no copy. A damaged copy is deleted."""
        path = self._path(part)
        if not path.exists():
            return None
        try:
            tensors, metadata = blobs.read(path)
            if metadata.get(DIGEST) != _digest(tensors):
                raise StorageError("its checksum differs")
        except StorageError as error:
            log.warning(
                "the packed copy of %s in %s is damaged (%s); packing the weights again", part, self.folder, error
            )
            blobs.remove(path)
            return None
        with suppress(OSError):
            os.utime(self.folder)
        return tensors

    def save(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a copy of a part. If the disk is full or read-only, the log says so, and the part has no copy."""
        size = blobs.tensor_bytes(tensors)
        try:
            limit = cache_limit()
            if size < SMALLEST_BYTES or size > limit // 2:
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sum(_size(file) for file in self.folder.glob("*.safetensors")) + size > limit:
                _warn_full(self.folder, limit)
                return
            for file in self.folder.glob(f"*{blobs.TEMPORARY}"):
                if blobs.stale(file):
                    blobs.remove(file)
            trim_cache(_root(), limit - size, lambda folder: folder.path == self.folder)
            metadata = {DIGEST: _digest(tensors), RECIPE: self.recipe}
            os.replace(blobs.write(self.folder, tensors, metadata), self._path(part))
        except (OSError, StorageError) as error:
            log.warning("no packed copy of %s is kept: %s", part, error)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part.replace('/', '_')}.safetensors"


def copies_by_recipe(fingerprint: Callable[[], str]) -> Callable[[str], PackedCopies | None]:
    """A function of a recipe that returns the copies of a model; it returns None if the fingerprint of the weights is ''."""

    def copies(recipe: str) -> PackedCopies | None:
        weights = fingerprint()
        return PackedCopies(weights, recipe) if weights else None

    return copies


def packed_folders() -> list[PackedFolder]:
    """All folders of copies, the most recently used first."""
    return [_packed(folder) for folder in cache_folders(_root())]


def remove_packed(name: str) -> int:
    """Delete the copies of one folder; return the number of bytes freed. 0 for an unknown name."""
    return remove_folder(_root(), name)


@cache
def _warn_full(folder: Path, limit: int) -> None:
    log.warning(
        "the packed copies in %s reach the limit of %.1f GB: other parts are packed at every load", folder, limit / 1e9
    )


def _root() -> Path:
    return home() / "cache" / "packed"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data.cast("B"))
    return digest.hexdigest()


def _packed(folder: CacheFolder) -> PackedFolder:
    files = [file for file in folder.path.glob("*.safetensors") if not blobs.temporary(file)]
    recipe = ""
    if files:
        with suppress(StorageError):
            recipe = blobs.read(files[0])[1].get(RECIPE, "")
    return PackedFolder(folder.path.name, recipe, folder.num_bytes, folder.last_used)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process has deleted it
        return 0
