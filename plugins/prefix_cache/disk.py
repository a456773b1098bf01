"""Saved prefixes: looked up and read in one thread, written in another, never in the engine's.

Whatever goes wrong here is logged and costs a computation, never an answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pitlane import Segment, StorageError, release_threads
from pitlane.plugins.prefix_cache import int8
from pitlane.storage.types import SavedPrefix

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.storage.db import Store

log = logging.getLogger("pitlane.prefix_cache")
MAX_WAITING = 2 * 10**9  # bytes in memory that wait to be written; a document beyond this limit is not saved
Result = TypeVar("Result")


class Disk:
    """Saved prefixes. `find` and `read` run on the reading thread (`submit`), the other methods on the engine's thread.

    quota_bytes: the disk space to trim to on opening. as_int8: whether KV is saved in half the space, approximately.
    """

    def __init__(self, quota_bytes: int) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-write")
        self._opening: Future[Store] = self._reader.submit(_open_store, quota_bytes)
        self._lock = threading.Lock()
        self._num_waiting = 0  # bytes
        self._was_failure_said = False

    @property
    def failed(self) -> bool:
        """Whether the store could not be opened; False while it is being opened."""
        return self._opening.done() and self._opening.exception() is not None

    def is_missed(self) -> bool:
        """Whether a document needs the store and it could not be opened. Warns once: a request without documents needs no store."""
        if self.failed and not self._was_failure_said:
            self._was_failure_said = True
            log.warning("documents are cached in memory only: %s", self._opening.exception())
        return self.failed

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a task on the reading thread."""
        return self._reader.submit(task)

    def find(self, fingerprint: str, keys: list[str], as_int8: bool) -> list[SavedPrefix]:
        """The prefixes saved under these keys, the longest first."""
        if self.is_missed():
            return []
        try:
            return self._opening.result().prefixes.find(_form(fingerprint, as_int8), keys)
        except StorageError as error:
            log.warning("saved prefixes cannot be searched: %s", error)
            return []

    def read(self, saved: SavedPrefix, token_ids: list[int], as_int8: bool) -> tuple[dict[str, Tensor] | None, str]:
        """Tensors of a saved prefix. If anything does not match, None and the reason; the file is dropped."""
        prefixes = self._opening.result().prefixes
        try:
            if prefixes.token_ids(saved) != token_ids:
                raise StorageError(f"{saved.file} holds other tokens")
            tensors = prefixes.load(saved)
            return (_unpacked(tensors) if as_int8 else tensors), ""
        except Exception as error:
            log.warning("the saved KV of %s is dropped and computed again: %s", saved.title or "a prefix", error)
            try:
                prefixes.discard(saved)
            except StorageError as second:
                log.warning("it cannot be dropped: %s", second)
            return None, str(error)

    def write(
        self,
        fingerprint: str,
        key: str,
        token_ids: list[int],
        pieces: list[dict[str, Tensor]],
        document: Segment,
        quota_bytes: int,
        as_int8: bool,
    ) -> None:
        """Write the KV of tokens on the writing thread. pieces: parts of it along the token axis, `[2, L, Hkv, n, D]` each."""
        if self.is_missed():
            return
        num_bytes = sum(tensor.nbytes for piece in pieces for tensor in piece.values())
        with self._lock:
            if self._num_waiting and self._num_waiting + num_bytes > MAX_WAITING:
                log.warning("the KV of %s was not saved: too much waits to be written", document.title)
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
                    _joined(pieces, as_int8),
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


def _joined(pieces: list[dict[str, Tensor]], as_int8: bool) -> Mapping[str, Tensor]:
    import torch

    with torch.inference_mode():
        whole = {name: torch.cat([piece[name] for piece in pieces], dim=3) for name in pieces[0]}
        packed = int8.pack(whole) if as_int8 else whole
    release_threads()
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = int8.unpack(packed)
    release_threads()
    return tensors


def _form(fingerprint: str, as_int8: bool) -> str:
    """The fingerprint of the saved KV: a plan that wants exact KV never reads int8."""
    return f"{fingerprint}+int8" if as_int8 else fingerprint


def _open_store(quota_bytes: int) -> Store:
    from pitlane.storage.db import Store

    return Store(quota_bytes=quota_bytes)
