"""Prefix cache: KV of known leading tokens is shared in memory, and a document's is saved and read back after a restart.

Changes in the loop: `match_prefix` hands over cached blocks (and the first tokens of one more), or a saved document's KV that
is being read, or waits for a request that computes the same tokens; `block_sealed` enters full blocks and copies documents
out to be saved; `reclaim_blocks` gives back the least recently used blocks.
Exactness: identical; with `int8`, which saves KV in half the space: approximate. Costs: one SHA-256 per block of 32 tokens, and
the disk. Helps whenever a prompt begins as an earlier one did: another question on a document, the next turn of a chat.
Paper: RadixAttention, https://arxiv.org/abs/2312.07104; block hashes as in vLLM.

Blocks in memory: index.py; files: disk.py. Windowed KV groups whose blocks were dropped are not saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast
from weakref import WeakKeyDictionary

from pydantic import Field

from pitlane import Plugin, PluginOptions, Pool, PrefixMatch, Save, Segment, Sequence, hookimpl
from pitlane.plugins.prefix_cache.disk import Disk
from pitlane.plugins.prefix_cache.index import BlockIndex, Chain, Column

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

WORTH_READING = 64  # tokens beyond memory's; for fewer, its shared blocks beat another copy of them all
EXPORT_TOKENS = 512  # copied out at once while a document is computed, so that no step is long for it


class PrefixCache(Plugin):
    name, exactness = "prefix_cache", "identical"

    class Options(PluginOptions):
        save_documents: bool = Field(
            True, title="Save documents", description="save the KV of documents, to read it back after a restart"
        )
        disk_gb: float = Field(
            10.0, gt=0, le=10_000, title="Disk space (GB)", description="most disk space that saved KV may take, in GB"
        )
        min_tokens: int = Field(
            64,
            ge=1,
            le=1_000_000,
            title="Shortest saved document",
            description="documents of fewer tokens are not saved",
        )
        int8: bool = Field(
            False, title="Store as int8", description="saved KV takes half the disk space, and is approximate"
        )

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self._indexes: WeakKeyDictionary[Pool, BlockIndex] = WeakKeyDictionary()
        wanted = self.options.save_documents  # opened before the first request needs it
        self._disk = Disk(int(self.options.disk_gb * 1e9), self.options.int8) if wanted else None

    @classmethod
    def exactness_for(cls, options: PluginOptions) -> Literal["identical", "approximate"]:
        """Approximate if what is read from disk is not what was computed."""
        chosen = cast(PrefixCache.Options, options)
        return "approximate" if chosen.save_documents and chosen.int8 else "identical"

    @hookimpl
    def match_prefix(self, seq: Sequence, pool: Pool) -> PrefixMatch | None:
        index = self._indexes.setdefault(pool, BlockIndex(pool))
        chain: Chain = seq.state.setdefault(self.name, Chain(pool, seq.salt))
        with index.leaving_on_error(chain):
            match = index.match(seq.token_ids, chain)
            computing = index.wait_for(chain, len(match.blocks))
            if computing is not None:
                return PrefixMatch(loading=computing)
            num_matched = len(match.blocks) * pool.block_size + (match.tail[1] if match.tail else 0)
            found = self._on_disk(seq, chain, num_matched)
            if found is None and seq.num_preemptions == 0:
                chain.memory_tokens = num_matched
            return found or match

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is None:
            return  # admitted under a plan without this plugin, or forked
        blocks = self._indexes[chain.pool]
        with blocks.leaving_on_error(chain):
            blocks.insert(seq, index, chain)
            if seq.segments and self._disk is not None:
                self._export(seq, chain, (index + 1) * chain.pool.block_size)

    @hookimpl
    def sequence_finished(self, seq: Sequence) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is None:
            return
        blocks = self._indexes[chain.pool]
        blocks.leave(chain)
        seq.notes[self.name] = {
            "memory_tokens": chain.memory_tokens,
            "disk_tokens": chain.disk_tokens,
            "documents": [s.title for s in seq.segments if s.end <= max(chain.memory_tokens, chain.disk_tokens)],
            "discarded": chain.discarded,
        }
        if seq.error is not None:
            return  # what its step was about to load or compute is not there
        if seq.segments and self._disk is not None:
            self._export(seq, chain, seq.num_computed_tokens)
        blocks.park(seq, chain)

    @hookimpl
    def reclaim_blocks(self, pool: Pool, num_blocks: int) -> None:
        if pool in self._indexes:
            self._indexes[pool].evict(num_blocks)

    @hookimpl
    def engine_closed(self) -> None:
        if self._disk is not None:
            self._disk.close()

    def locked(self, pool: Pool) -> list[Column]:
        """Columns held in memory, for integrity checks."""
        return self._indexes[pool].columns if pool in self._indexes else []

    def _on_disk(self, seq: Sequence, chain: Chain, num_matched: int) -> PrefixMatch | None:
        """A saved prefix that is longer than what memory has: first its rows are looked up, then it is read."""
        disk = self._disk
        ends = [s.end for s in seq.segments if self.options.min_tokens <= s.end < seq.num_tokens]
        if disk is None or not ends or disk.is_missed():
            return None
        fingerprint, saved = chain.pool.fingerprint, chain.saved
        if saved is None:
            keys = [chain.prefix_hash(seq.token_ids, end) for end in ends]
            chain.saved = []

            def look_up() -> Mapping[str, Tensor] | None:
                chain.saved = disk.find(fingerprint, keys)
                return None

            looking = disk.submit(look_up)  # where memory has it all, only to renew the dates of use
            return PrefixMatch(loading=looking) if max(ends) > num_matched else None
        if not saved or saved[0].num_tokens <= num_matched + (WORTH_READING if num_matched else 0):
            return None
        longest, token_ids = saved[0], seq.token_ids[: saved[0].num_tokens]

        def read() -> dict[str, Tensor] | None:
            tensors, reason = disk.read(longest, token_ids)
            if tensors is None:
                chain.saved = saved[1:]
                chain.discarded.append(reason)
            elif seq.num_preemptions == 0:
                chain.disk_tokens = longest.num_tokens
            return tensors

        return PrefixMatch(loading=disk.submit(read), num_loading_tokens=longest.num_tokens)

    def _export(self, seq: Sequence, chain: Chain, num_ready: int) -> None:
        """Copy out what is computed of documents that no cache had, in pieces; a document's last piece has it written."""
        wanted = [
            s
            for s in seq.segments
            if s.end > max(seq.num_cached_tokens, chain.num_exported, self.options.min_tokens - 1)
        ]
        for segment in wanted:
            start, stop = chain.num_exported, min(num_ready, segment.end)
            if stop <= start or (stop < segment.end and stop - start < EXPORT_TOKENS):
                return
            if not _is_whole(seq, chain.pool, start, stop):
                chain.num_exported = seq.num_tokens + seq.num_remaining_tokens
                return
            seq.operations.append(self._save_operation(seq, chain, stop, segment if stop == segment.end else None))
            chain.num_exported = stop

    def _save_operation(self, seq: Sequence, chain: Chain, stop: int, document: Segment | None) -> Save:
        pool, disk, start = chain.pool, self._disk, chain.num_exported
        assert disk is not None
        key = chain.prefix_hash(seq.token_ids, stop) if document else ""
        token_ids = seq.token_ids[:stop]

        def sink(tensors: dict[str, Tensor]) -> None:
            chain.pieces.append(tensors)
            if document is not None:
                disk.write(pool.fingerprint, key, token_ids, list(chain.pieces), document)

        return Save([pool.slots(seq, group, start, stop) for group in range(len(pool.groups))], sink)


def _is_whole(seq: Sequence, pool: Pool, start: int, stop: int) -> bool:
    """Whether no window has dropped a block of the tokens `[start, stop)`."""
    size = pool.block_size
    return all(min(table[start // size : -(-stop // size)]) >= 0 for table in seq.block_tables)
