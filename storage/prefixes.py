"""Saved prefixes: the KV of a prompt's leading blocks. A prefix is a row in SQLite and a safetensors file.

Row and file change inside one write transaction: a save renames the file and inserts the row, a removal deletes the row
and then the file. So a process that holds the write lock sees a file without a row, or a row without a file, only after a
crash. Opening the store removes both, and temporary files of saves that are older than an hour.
Loading checks size, checksum and metadata. Knows nothing of blocks, models or the meaning of the tensors: a fingerprint
and a block hash are opaque text.
"""

from __future__ import annotations

import builtins
import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pitlane.storage import blobs
from pitlane.storage.errors import NotFound, PrefixMismatch, StorageError, reason_of
from pitlane.storage.types import SavedPrefix, storable

if TYPE_CHECKING:
    import torch

    from pitlane.storage.sqlite_file import SqliteFile

FORMAT = "pitlane-prefix-1"
DEFAULT_QUOTA_BYTES = 10 * 10**9
_TOUCH_SECONDS = 60.0
_COLUMNS = ", ".join(field.name for field in fields(SavedPrefix))


class Prefixes:
    """Save, find, load, pin and prune saved prefixes."""

    def __init__(self, file: SqliteFile, folder: Path, *, quota_bytes: int | None = None) -> None:
        """Open `folder`, which belongs to this store alone, and clean it. Keep at most `quota_bytes` in it.

        None: opening prunes nothing, because another process may use a larger quota; saves prune to the default quota.
        """
        self._file = file
        self.folder = folder
        self.quota_bytes = DEFAULT_QUOTA_BYTES if quota_bytes is None else quota_bytes
        self._touched: dict[int, float] = {}
        self._flushed = time.monotonic()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise StorageError(
                f"cannot use {folder} ({reason_of(error)}); set PITLANE_HOME to another folder"
            ) from None
        if quota_bytes is not None:
            self.prune(quota_bytes)

    def save(
        self,
        fingerprint: str,
        block_hash: str,
        token_ids: Sequence[int],
        tensors: Mapping[str, torch.Tensor],
        *,
        title: str = "",
        document_hash: str | None = None,
    ) -> SavedPrefix:
        """Save the KV of `token_ids`, after pruning to the quota. If it is saved already, return the saved prefix."""
        saved = self._intact(fingerprint, block_hash)
        if saved:
            self._touch(saved)
            return saved
        self._make_room(blobs.tensor_bytes(tensors))
        temporary = blobs.write(self.folder, tensors, _metadata(fingerprint, block_hash, len(token_ids)))
        try:
            num_bytes, checksum = temporary.stat().st_size, blobs.checksum(temporary)
            self._make_room(num_bytes)  # a file is larger than its tensors
            with self._file.transaction() as db:
                saved = self._intact(fingerprint, block_hash)  # another process may have been faster
                if saved:
                    return saved
                now, file = time.time(), _file_name(fingerprint, block_hash)
                blobs.publish(temporary, self.folder / file)
                row = {"fingerprint": fingerprint, "block_hash": block_hash, "num_tokens": len(token_ids)}
                row |= {"file": file, "num_bytes": num_bytes, "checksum": checksum, "created": now, "last_used": now}
                row |= {"title": storable(title), "document_hash": document_hash}
                db["prefixes"].insert({**row, "token_ids": array("q", token_ids).tobytes()}, replace=True)
                return self._where("fingerprint = ? AND block_hash = ?", fingerprint, block_hash)[0]
        finally:
            blobs.remove(temporary)

    def find(self, fingerprint: str, block_hashes: Sequence[str]) -> builtins.list[SavedPrefix]:
        """Return the saved prefixes with these block hashes, longest first. `load` may still find a file damaged."""
        marks = ", ".join("?" * len(block_hashes))
        condition = f"fingerprint = ? AND block_hash IN ({marks}) ORDER BY num_tokens DESC"
        prefixes = self._where(condition, fingerprint, *block_hashes)
        for prefix in prefixes:
            self._touch(prefix)
        return prefixes

    def load(self, prefix: SavedPrefix) -> dict[str, torch.Tensor]:
        """Map a prefix's tensors. Raises PrefixMismatch if size, checksum or metadata differ from its row."""
        path = self.folder / prefix.file
        try:
            size = path.stat().st_size
            if size != prefix.num_bytes:
                raise PrefixMismatch(f"{path.name} has {size} bytes, {prefix.num_bytes} were saved")
            checksum = blobs.checksum(path)
        except OSError as error:
            raise PrefixMismatch(f"{path.name} is gone or cannot be read ({error.strerror})") from error
        if checksum != prefix.checksum:
            raise PrefixMismatch(f"{path.name} has the checksum {checksum[:12]}, {prefix.checksum[:12]} was saved")
        tensors, metadata = blobs.read(path)
        for key, expected in _metadata(prefix.fingerprint, prefix.block_hash, prefix.num_tokens).items():
            if metadata.get(key) != expected:
                raise PrefixMismatch(f"{path.name} says {key} = {metadata.get(key)!r}, its row {expected!r}")
        return tensors

    def token_ids(self, prefix: SavedPrefix) -> builtins.list[int]:
        """Return the tokens whose KV was saved. The caller compares them with the prompt."""
        rows = self._file.rows("SELECT token_ids FROM prefixes WHERE id = ?", (prefix.id,))
        ids = array("q", rows[0]["token_ids"] if rows else b"")
        if len(ids) != prefix.num_tokens:
            raise PrefixMismatch(f"{prefix.file} has {len(ids)} token ids in its row, {prefix.num_tokens} were saved")
        return ids.tolist()

    def discard(self, prefix: SavedPrefix) -> None:
        """Delete a prefix, row and file. Does nothing if it was deleted, or deleted and saved again, meanwhile."""
        with self._file.transaction() as db:
            if db.execute("DELETE FROM prefixes WHERE id = ?", (prefix.id,)).rowcount:
                blobs.remove(self.folder / prefix.file)
        self._touched.pop(prefix.id, None)

    def list(self) -> builtins.list[SavedPrefix]:
        """Return all saved prefixes, most recently used first."""
        self.flush()
        return self._where("1 ORDER BY last_used DESC, id DESC")

    def pin(self, prefix_id: int, pinned: bool = True) -> None:
        """Protect a prefix from pruning, or end the protection."""
        with self._file.transaction() as db:
            if not db.execute("UPDATE prefixes SET pinned = ? WHERE id = ?", (pinned, prefix_id)).rowcount:
                raise self._missing(prefix_id)

    def remove(self, prefix_id: int) -> None:
        """Remove one prefix, pinned or not."""
        prefixes = self._where("id = ?", prefix_id)
        if not prefixes:
            raise self._missing(prefix_id)
        self.discard(prefixes[0])

    def remove_document(self, document_hash: str) -> None:
        """Remove all prefixes of a document."""
        for prefix in self._where("document_hash = ?", document_hash):
            self.discard(prefix)

    def prune(self, max_bytes: int) -> builtins.list[SavedPrefix]:
        """Remove the least recently used prefixes until at most `max_bytes` are left; return them. Keeps pinned prefixes."""
        self.flush()
        removed = []
        with self._file.transaction():
            excess = self.total_bytes() - max_bytes
            for prefix in self._where("NOT pinned ORDER BY last_used, id") if excess > 0 else []:
                if excess <= 0:
                    break
                self.discard(prefix)
                removed.append(prefix)
                excess -= prefix.num_bytes
        return removed

    def total_bytes(self) -> int:
        """Bytes of all saved prefixes."""
        return int(self._file.rows("SELECT coalesce(sum(num_bytes), 0) AS total FROM prefixes")[0]["total"])

    def flush(self) -> None:
        """Write the dates of last use. `find` only notes them in memory, so that a hit costs no write."""
        touched, self._touched, self._flushed = self._touched, {}, time.monotonic()
        if touched:
            with self._file.transaction() as db:
                rows = [(when, key) for key, when in touched.items()]
                db.conn.executemany("UPDATE prefixes SET last_used = ? WHERE id = ?", rows)

    def _touch(self, prefix: SavedPrefix) -> None:
        self._touched[prefix.id] = time.time()
        if time.monotonic() - self._flushed > _TOUCH_SECONDS:
            self.flush()

    def _intact(self, fingerprint: str, block_hash: str) -> SavedPrefix | None:
        """The saved prefix if its file has the right size; `load` checks the checksum."""
        prefixes = self._where("fingerprint = ? AND block_hash = ?", fingerprint, block_hash)
        try:
            has_file = bool(prefixes) and (self.folder / prefixes[0].file).stat().st_size == prefixes[0].num_bytes
        except OSError:
            return None
        return prefixes[0] if has_file else None

    def _make_room(self, num_bytes: int) -> None:
        pinned = sum(prefix.num_bytes for prefix in self._where("pinned"))
        if pinned + num_bytes > self.quota_bytes:
            raise StorageError(
                f"a prefix of {num_bytes / 1e6:.0f} MB does not fit: the quota is {self.quota_bytes / 1e6:.0f} MB, "
                f"{pinned / 1e6:.0f} MB of it pinned; raise the quota or unpin some"
            )
        self.prune(self.quota_bytes - num_bytes)

    def _clean(self) -> None:
        """Delete rows without files, files without rows, and old temporary files."""
        with self._file.transaction():
            for prefix in self._where("1"):
                if not (self.folder / prefix.file).is_file():
                    self.discard(prefix)
            saved_files = {prefix.file for prefix in self._where("1")}
            for path in self.folder.iterdir():
                has_no_row = path.suffix == ".safetensors" and path.name not in saved_files
                if has_no_row or (blobs.temporary(path) and blobs.stale(path)):
                    blobs.remove(path)

    def _where(self, condition: str, *parameters: Any) -> builtins.list[SavedPrefix]:
        rows = self._file.rows(f"SELECT {_COLUMNS} FROM prefixes WHERE {condition}", parameters)
        return [SavedPrefix(**{**row, "pinned": bool(row["pinned"])}) for row in rows]

    def _missing(self, prefix_id: int) -> NotFound:
        known = ", ".join(str(prefix.id) for prefix in self.list()[:20]) or "none"
        return NotFound(f"no saved prefix {prefix_id}; saved are: {known}")


def _metadata(fingerprint: str, block_hash: str, num_tokens: int) -> dict[str, str]:
    return {"format": FORMAT, "fingerprint": fingerprint, "block_hash": block_hash, "num_tokens": str(num_tokens)}


def _file_name(fingerprint: str, block_hash: str) -> str:
    return hashlib.sha256(f"{fingerprint}\n{block_hash}".encode()).hexdigest()[:32] + ".safetensors"
