"""Saved prefixes. A reading thread looks up and reads; a writing thread writes. The engine's thread never touches the disk.

A failure here is logged and costs a computation, never an answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from pitlane import Segment, StorageError, release_threads
from pitlane.plugins.prefix_cache import int8
from pitlane.storage.types import SavedPrefix

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.storage.db import Store

log = logging.getLogger("pitlane.prefix_cache")
# Opening takes about 0.02 s. A process that forks while it opens SQLite leaves the child with a lock that nobody holds; a disk that
# hangs delays a lane by no more than this.
OPENING_SECONDS = 1.0
MAX_WAITING = 2 * 10**9  # bytes queued for the writing thread; beyond this limit, a document is not saved
Result = TypeVar("Result")


class Disk:
    """Saved prefixes. `find` and `read` run on the reading thread (`submit`), the other methods on the engine's thread.

    quota_bytes: limit of disk space, applied on opening. as_int8, in the methods: save KV as int8, in half the space.
    """

    def __init__(self, quota_bytes: int) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-write")
        self._opening: Future[Store] = self._reader.submit(_open_store, quota_bytes)
        wait([self._opening], OPENING_SECONDS)
        self._lock = threading.Lock()
        self._num_waiting = 0  # bytes
        self._was_failure_said = False

    @property
    def failed(self) -> bool:
        """Whether opening the store failed. False while the opening runs."""
        return self._opening.done() and self._opening.exception() is not None

    def is_missed(self) -> bool:
        """Whether opening failed. Warns once, so call it only if a document needs the store."""
        if self.failed and not self._was_failure_said:
            self._was_failure_said = True
            log.warning("documents are cached in memory only: %s", self._opening.exception())
        return self.failed

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a task on the reading thread."""
        return self._reader.submit(task)

    def find(self, fingerprint: str, keys: list[str], as_int8: bool) -> list[SavedPrefix]:
        """Saved prefixes with these keys, the longest first."""
        if self.is_missed():
            return []
        try:
            return self._opening.result().prefixes.find(_form(fingerprint, as_int8), keys)
        except StorageError as error:
            log.warning("saved prefixes cannot be searched: %s", error)
            return []

    def read(
        self, saved: SavedPrefix, token_ids: list[int], kept: list[tuple[int, int]], as_int8: bool
    ) -> tuple[dict[str, Tensor] | None, str]:
        """Read the tensors of a saved prefix. On any failure, discard the file and return None and the reason.

        kept: per KV group, how many of the first and of the last tokens of the prefix the tensor must hold.
        """
        prefixes = self._opening.result().prefixes
        try:
            if prefixes.token_ids(saved) != token_ids:
                raise StorageError(f"{saved.file} holds other tokens")
            tensors = prefixes.load(saved)
            tensors = _unpacked(tensors) if as_int8 else tensors
            for group, (num_first, num_last) in enumerate(kept):
                count, needed = tensors[f"group.{group}"].shape[3], num_first + num_last
                if count < needed or (num_first and count != needed):
                    amount = "too few" if count < needed else "too many"
                    raise StorageError(f"{saved.file} holds {amount} tokens of group {group}; {needed} are needed")
            return tensors, ""
        except Exception as error:
            log.warning("the saved KV of %s is dropped and computed again: %s", saved.title or "a prefix", error)
            try:
                prefixes.discard(saved)
            except StorageError as second:
                log.warning("the saved KV cannot be dropped: %s", second)
            return None, str(error)

    def write(
        self,
        fingerprint: str,
        key: str,
        token_ids: list[int],
        pieces: list[Mapping[str, Tensor]],
        kept: list[tuple[int, int]],
        document: Segment,
        quota_bytes: int,
        as_int8: bool,
    ) -> None:
        """Queue the KV of a document for the writing thread.

        pieces: parts along the token axis n, `[2, L, Hkv, n, D]`. kept: per KV group, how many of the first and of the last
        tokens to save.
        """
        if self.is_missed():
            return
        num_bytes = sum(tensor.nbytes for piece in pieces for tensor in piece.values())
        with self._lock:
            if self._num_waiting and self._num_waiting + num_bytes > MAX_WAITING:
                log.warning("the KV of %s was not saved: too many bytes wait for the disk", document.title)
                return
            self._num_waiting += num_bytes

        def write() -> None:
            try:
                prefixes = self._opening.result().prefixes
                prefixes.quota_bytes = quota_bytes
                prefixes.save(
                    _form(fingerprint, as_int8),
                    key,
                    token_ids,
                    _joined(pieces, kept, as_int8),
                    title=document.title,
                    document_hash=document.document_hash,
                )
            except Exception as error:
                log.warning("the KV of %s was not saved: %s", document.title, error)
            finally:
                with self._lock:
                    self._num_waiting -= num_bytes

        self._writer.submit(write)

    def close(self) -> None:
        """Finish reading and writing, and close the store."""
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        if not self.failed:
            self._opening.result().close()


def _joined(pieces: list[Mapping[str, Tensor]], kept: list[tuple[int, int]], as_int8: bool) -> Mapping[str, Tensor]:
    import torch

    with torch.inference_mode():
        whole = {}
        for group, (num_first, num_last) in enumerate(kept):
            part = torch.cat([piece[f"group.{group}"] for piece in pieces], dim=3)
            ends = part[:, :, :, :num_first], part[:, :, :, part.shape[3] - num_last :]
            whole[f"group.{group}"] = torch.cat(ends, dim=3) if num_first else ends[1].contiguous()
        packed = int8.pack(whole) if as_int8 else whole
    release_threads()
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = int8.unpack(packed)
    release_threads()
    return tensors


def _form(fingerprint: str, as_int8: bool) -> str:
    """The fingerprint under which KV is saved. int8 KV has a separate fingerprint, so an exact plan never reads int8."""
    return f"{fingerprint}+int8" if as_int8 else fingerprint


def _open_store(quota_bytes: int) -> Store:
    from pitlane.storage.db import Store

    return Store(quota_bytes=quota_bytes)
