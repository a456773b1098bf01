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
MOST_WAITING = 2 * 10**9  # bytes in memory that wait to be written; what comes beyond is not saved
Result = TypeVar("Result")


class Disk:
    """Saved prefixes of one set of options. `find` and `read` are for `submit`; the rest is for the engine's thread."""

    def __init__(self, quota_bytes: int, as_int8: bool) -> None:
        self.as_int8 = as_int8
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix-write")
        self._opening: Future[Store] = self._reader.submit(_open_store, quota_bytes)
        self._lock = threading.Lock()
        self._num_waiting = 0  # bytes
        self._was_failure_said = False

    @property
    def failed(self) -> bool:
        """Whether the store could not be opened; not known until it was tried."""
        return self._opening.done() and self._opening.exception() is not None

    def is_missed(self) -> bool:
        """Whether a document needs the store and it could not be opened. Warns once: a request without documents needs no store."""
        if self.failed and not self._was_failure_said:
            self._was_failure_said = True
            log.warning("documents are cached in memory only: %s", self._opening.exception())
        return self.failed

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Have the reading thread do something."""
        return self._reader.submit(task)

    def find(self, fingerprint: str, keys: list[str]) -> list[SavedPrefix]:
        """What is saved under these keys, the longest first."""
        if self.is_missed():
            return []
        try:
            return self._opening.result().prefixes.find(self._form(fingerprint), keys)
        except StorageError as error:
            log.warning("saved prefixes cannot be searched: %s", error)
            return []

    def read(self, saved: SavedPrefix, token_ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
        """Tensors of a saved prefix; None and the reason, and its file is dropped, if anything about it does not match."""
        prefixes = self._opening.result().prefixes
        try:
            if prefixes.token_ids(saved) != token_ids:
                raise StorageError(f"{saved.file} holds other tokens")
            tensors = prefixes.load(saved)
            return (self._unpacked(tensors) if self.as_int8 else tensors), ""
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
    ) -> None:
        """Have the KV of tokens written, pieces of it along the token axis `[2, L, Hkv, n, D]`."""
        if self.is_missed():
            return
        num_bytes = sum(tensor.nbytes for piece in pieces for tensor in piece.values())
        with self._lock:
            if self._num_waiting and self._num_waiting + num_bytes > MOST_WAITING:
                log.warning("the KV of %s was not saved: too much waits to be written", document.title)
                return
            self._num_waiting += num_bytes

        def write() -> None:
            try:
                self._opening.result().prefixes.save(
                    self._form(fingerprint),
                    key,
                    token_ids,
                    self._joined(pieces),
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
        """Finish what was asked for, and close the store."""
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        if not self.failed:
            self._opening.result().close()

    def _joined(self, pieces: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
        import torch

        with torch.inference_mode():
            whole = {name: torch.cat([piece[name] for piece in pieces], dim=3) for name in pieces[0]}
            packed = int8.pack(whole) if self.as_int8 else whole
        release_threads()
        return packed

    def _unpacked(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = int8.unpack(packed)
        release_threads()
        return tensors

    def _form(self, fingerprint: str) -> str:
        """int8 is another KV: never read under a plan that wants the exact one."""
        return f"{fingerprint}+int8" if self.as_int8 else fingerprint


def _open_store(quota_bytes: int) -> Store:
    from pitlane.storage.db import Store

    return Store(quota_bytes=quota_bytes)
