"""Prefix cache: KV of known leading tokens is shared in memory, and a document's is saved and read back after a restart.

Changes in the loop: `match_prefix` hands over cached blocks (and the first tokens of one more), or a saved document's KV that
is being read; `block_sealed` enters full blocks; `reclaim_blocks` gives back the least recently used ones.
Exactness: identical. Costs: one SHA-256 per block of 32 tokens, and the disk. Helps whenever a prompt begins as an earlier one
did: another question on a document, the next turn of a chat.
Paper: RadixAttention, https://arxiv.org/abs/2312.07104; block hashes as in vLLM.

Identity of a block: SHA-256 over (parent's identity, token ids), the root being the lane's fingerprint and the request's
salt; a hit also compares the token ids. Cached blocks are `Column`s, one block id per KV group.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pydantic import Field

from pitlane import Plugin, PluginOptions, Pool, PrefixMatch, Save, Segment, Sequence, StorageError, hookimpl
from pitlane.storage.types import SavedPrefix

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.storage.db import Store

log = logging.getLogger("pitlane.prefix_cache")
Column = tuple[int, ...]
MAX_CHILDREN = 16  # continuations of one block that are compared for a partial match


class PrefixCache(Plugin):
    name, exactness = "prefix_cache", "identical"

    class Options(PluginOptions):
        save_documents: bool = Field(True, description="save the KV of documents, to be read back after a restart")
        disk_gb: float = Field(10.0, gt=0, le=10_000, description="most disk space for saved KV, in GB")
        min_tokens: int = Field(64, ge=1, le=1_000_000, description="shorter documents are not saved")

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self._indexes: WeakKeyDictionary[Pool, BlockIndex] = WeakKeyDictionary()
        self._files = ThreadPoolExecutor(1, thread_name_prefix="pitlane-prefix")
        self._opening: Future[Store] | None = None
        if self.options.save_documents:  # opened before the first request needs it
            self._opening = self._files.submit(_open_store, int(self.options.disk_gb * 1e9))

    @property
    def _saves(self) -> bool:
        """Whether documents are saved: wanted, and the store did not fail to open."""
        return self._opening is not None and self._opening.exception() is None

    @property
    def _store(self) -> Store:
        assert self._opening is not None, "nothing is saved under save_documents=false"
        return self._opening.result()

    @hookimpl
    def match_prefix(self, seq: Sequence, pool: Pool) -> PrefixMatch | None:
        index = self._indexes.setdefault(pool, BlockIndex(pool))
        chain = seq.state.setdefault(self.name, Chain(pool, seq.salt))
        match = index.match(seq.token_ids, chain)
        num_matched = len(match.blocks) * pool.block_size + (match.tail[1] if match.tail else 0)
        saved = self._find_saved(seq, chain)
        if saved is not None and num_matched < saved.num_tokens < seq.num_tokens:
            return PrefixMatch(
                loading=self._files.submit(self._load, saved, seq.token_ids[: saved.num_tokens]),
                num_loading_tokens=saved.num_tokens,
            )
        return match

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is None:
            return  # admitted under a plan without this plugin
        self._indexes[chain.pool].insert(seq, index, chain)
        self._save_documents(seq, chain, (index + 1) * chain.pool.block_size)

    @hookimpl
    def sequence_finished(self, seq: Sequence) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is not None:
            self._save_documents(seq, chain, seq.num_computed_tokens)

    @hookimpl
    def reclaim_blocks(self, pool: Pool, num_blocks: int) -> None:
        if pool in self._indexes:
            self._indexes[pool].evict(num_blocks)

    @hookimpl
    def engine_closed(self) -> None:
        self._files.shutdown(wait=True)
        if self._saves:
            self._store.close()

    def locked(self, pool: Pool) -> list[Column]:
        """Columns held in memory, for integrity checks."""
        return self._indexes[pool].columns if pool in self._indexes else []

    def _find_saved(self, seq: Sequence, chain: Chain) -> SavedPrefix | None:
        if not (self._saves and seq.segments):
            return None
        hashes = [chain.prefix_hash(seq.token_ids, segment.end) for segment in seq.segments]
        try:
            chain.saved = {key for key in hashes if self._store.prefixes.find(chain.pool.fingerprint, [key])}
            return self._store.prefixes.find(chain.pool.fingerprint, hashes)
        except StorageError as error:
            log.warning("saved prefixes cannot be searched: %s", error)
            return None

    def _load(self, saved: SavedPrefix, token_ids: list[int]) -> Mapping[str, Tensor] | None:
        """Runs in the file thread. None (and the file is dropped) if anything about it does not match."""
        try:
            if self._store.prefixes.token_ids(saved) != token_ids:
                raise StorageError(f"{saved.file} holds other tokens")
            return self._store.prefixes.load(saved)
        except Exception as error:
            log.warning("a saved prefix is dropped and computed again: %s", error)
            try:
                self._store.prefixes.discard(saved)
            except StorageError as second:
                log.warning("it cannot be dropped: %s", second)
            return None

    def _save_documents(self, seq: Sequence, chain: Chain, num_ready: int) -> None:
        """Ask for the KV of documents that are computed and not yet saved."""
        if not self._saves:
            return
        for segment in seq.segments:
            if self.options.min_tokens <= segment.end <= num_ready:
                key = chain.prefix_hash(seq.token_ids, segment.end)
                if key not in chain.saved and _is_whole(seq, chain.pool, segment.end):
                    chain.saved.add(key)
                    seq.operations.append(self._save_operation(seq, chain, segment, key))

    def _save_operation(self, seq: Sequence, chain: Chain, segment: Segment, key: str) -> Save:
        pool, token_ids = chain.pool, seq.token_ids[: segment.end]

        def write(tensors: dict[str, Tensor]) -> None:
            try:
                self._store.prefixes.save(
                    pool.fingerprint, key, token_ids, tensors, title=segment.title, document_hash=segment.document_hash
                )
            except Exception as error:
                log.warning("the KV of %s was not saved: %s", segment.title, error)

        slots = [pool.slots(seq, group, 0, segment.end) for group in range(len(pool.groups))]
        return Save(slots, lambda tensors: self._files.submit(write, tensors))


@dataclass(slots=True)
class Chain:
    """Identities of one sequence's full blocks, computed as it grows, and of documents known to be on disk."""

    pool: Pool
    salt: str
    hashes: list[bytes] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)

    def upto(self, token_ids: SequenceOf[int], count: int) -> list[bytes]:
        """Identities of the first `count` blocks."""
        size = self.pool.block_size
        for index in range(len(self.hashes), count):
            self.hashes.append(block_hash(self.parent(index), token_ids[index * size : (index + 1) * size]))
        return self.hashes[:count]

    def parent(self, index: int) -> bytes:
        """Identity of the block before block `index`."""
        return self.hashes[index - 1] if index else f"{self.pool.fingerprint}/{self.salt}".encode()

    def prefix_hash(self, token_ids: SequenceOf[int], end: int) -> str:
        """Identity of the tokens `[0, end)`, whose last block may be partial."""
        count = end // self.pool.block_size
        self.upto(token_ids, count)
        return block_hash(self.parent(count), token_ids[count * self.pool.block_size : end]).hex()


@dataclass(slots=True)
class Entry:
    """A cached block: its tokens, where it is, whose continuation it is."""

    token_ids: list[int]
    column: Column
    parent: bytes


class BlockIndex:
    """Cached blocks of one pool, least recently used first."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.children: dict[bytes, list[bytes]] = {}

    @property
    def columns(self) -> list[Column]:
        return [entry.column for entry in self.entries.values()]

    def match(self, token_ids: list[int], chain: Chain) -> PrefixMatch:
        """The longest cached prefix that leaves a token to compute."""
        size = self.pool.block_size
        match = PrefixMatch()
        hashes = chain.upto(token_ids, (len(token_ids) - 1) // size)
        for index, key in enumerate(hashes):
            entry = self.entries.get(key)
            if entry is None or entry.token_ids != token_ids[index * size : (index + 1) * size]:
                break
            match.blocks.append(entry.column)
        for key in reversed(hashes[: len(match.blocks)]):  # parents stay longer than their continuations
            self.entries.move_to_end(key)
        match.tail = self._tail(token_ids[len(match.blocks) * size : -1], chain.parent(len(match.blocks)))
        return match

    def _tail(self, token_ids: list[int], parent: bytes) -> tuple[Column, int] | None:
        """The cached continuation of `parent` that shares most first tokens with `token_ids`."""
        best, length = None, 0
        for key in self.children.get(parent, ())[-MAX_CHILDREN:]:
            entry = self.entries[key]
            common = next((i for i, (a, b) in enumerate(zip(entry.token_ids, token_ids, strict=False)) if a != b), None)
            common = min(len(entry.token_ids), len(token_ids)) if common is None else common
            if common > length and min(entry.column) >= 0:
                best, length = entry.column, common
        return (best, length) if best is not None else None

    def insert(self, seq: Sequence, index: int, chain: Chain) -> None:
        """Hold a sealed block; an equal one that is held already stays instead."""
        key = chain.upto(seq.token_ids, index + 1)[index]
        column = seq.column(index)
        if key in self.entries or min(column) < 0:
            return
        size, parent = self.pool.block_size, chain.parent(index)
        self.pool.lock(column)
        self.entries[key] = Entry(seq.token_ids[index * size : (index + 1) * size], column, parent)
        self.children.setdefault(parent, []).append(key)

    def evict(self, num_blocks: int) -> None:
        """Give back the least recently used blocks that nobody else holds."""
        idle = (key for key, entry in self.entries.items() if self.pool.is_idle(entry.column))
        for key in list(islice(idle, num_blocks)):
            entry = self.entries.pop(key)
            self.children[entry.parent].remove(key)
            if not self.children[entry.parent]:
                del self.children[entry.parent]
            self.pool.unlock(entry.column)


def _open_store(quota_bytes: int) -> Store:
    """Runs in the file thread."""
    try:
        from pitlane.storage.db import Store

        return Store(quota_bytes=quota_bytes)
    except Exception as error:
        log.warning("documents are cached in memory only: %s", error)
        raise


def _is_whole(seq: Sequence, pool: Pool, end: int) -> bool:
    """Whether no window has dropped a block of the tokens `[0, end)`."""
    return all(min(table[: -(-end // pool.block_size)]) >= 0 for table in seq.block_tables)


def block_hash(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """Identity of a block of tokens behind `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
