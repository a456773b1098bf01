"""Prefix cache: share the KV of known leading tokens in memory; save the KV of documents, and read it back after a restart.

Changes in the loop: `match_prefix` returns cached blocks (and the first tokens of a further block), or the saved KV of a document,
or a wait for a request that computes the same tokens. `block_sealed` caches full blocks, and copies the KV of documents for the
disk. `reclaim_blocks` frees the least recently used blocks.
Exactness: identical; with `int8`, approximate: saved KV then takes half the space. Costs: a SHA-256 per block of 32 tokens, and
disk space. Helps if a prompt begins like an earlier prompt: the next question on a document, the next turn of a chat.
Paper: RadixAttention, https://arxiv.org/abs/2312.07104; block hashes as in vLLM.

cache.py: the plugin's state in a lane. chain.py: its state of a sequence. index.py: the blocks in memory. disk.py: the files. In
a KV group with a limit of visible tokens, a file holds only the blocks that the next token sees: the last window, and the sinks
before it. When blocks are lacking, memory keeps only these blocks too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from pitlane import Plugin, PluginOptions, PrefixMatch, Segment, Sequence, hookimpl
from pitlane.plugins.prefix_cache.cache import Cache
from pitlane.plugins.prefix_cache.chain import Chain
from pitlane.plugins.prefix_cache.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pitlane import Lane, Pool

WORTH_READING = 64  # extra tokens from which we read a file; for fewer, sharing blocks beats copying the file
EXPORT_TOKENS = 512  # tokens per copy while a document is computed: bounds the time of a step


class PrefixCache(Plugin):
    name, exactness, is_default = "prefix_cache", "identical", True

    class Options(PluginOptions):
        save_documents: bool = Field(
            True, title="Save documents", description="save the KV of documents, to read it back after a restart"
        )
        disk_gb: float = Field(
            10.0, gt=0, le=10_000, title="Disk space (GB)", description="maximum disk space for saved KV, in GB"
        )
        min_tokens: int = Field(
            64,
            ge=1,
            le=1_000_000,
            title="Shortest saved document",
            description="minimum number of tokens of a saved document",
        )
        int8: bool = Field(
            False, title="Store as int8", description="save KV as int8: half the disk space, but approximate"
        )

    @classmethod
    def exactness_for(cls, options: PluginOptions) -> Literal["identical", "approximate"]:
        """Approximate if saved KV differs from computed KV."""
        chosen = cast(PrefixCache.Options, options)
        return "approximate" if chosen.save_documents and chosen.int8 else "identical"

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        cache = cast(Cache, lane.state.setdefault(self.name, Cache(lane.pool)))
        if self.options.save_documents:
            cache.open_disk(self._quota)  # early: opening runs on its own thread

    @hookimpl
    def match_prefix(self, seq: Sequence, lane: Lane) -> PrefixMatch | None:
        cache, pool = cast(Cache, lane.state[self.name]), lane.pool
        index = cache.index(self._is_exact)
        chain: Chain = seq.state.setdefault(self.name, Chain(pool, seq.request.salt))
        with index.leaving_on_error(chain):
            match = index.match(seq.token_ids, chain)
            computing = index.wait_for(chain, len(match.blocks))
            if computing is not None:
                return PrefixMatch(loading=computing)
            num_matched = len(match.blocks) * pool.block_size + (match.tail[1] if match.tail else 0)
            saved = self._on_disk(seq, chain, cache, num_matched)
            if saved is None and seq.num_preemptions == 0:
                chain.memory_tokens = num_matched
            return saved or match

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int, lane: Lane) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is None:
            return  # the sequence is a fork
        cache = cast(Cache, lane.state[self.name])
        blocks = cache.index(self._is_exact)
        with blocks.leaving_on_error(chain):
            blocks.insert(seq, index, chain)
            self._export(seq, chain, cache, seq.kv.num_computed_tokens)

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        chain: Chain | None = seq.state.get(self.name)
        if chain is None:
            return
        cache = cast(Cache, lane.state[self.name])
        blocks = cache.index(self._is_exact)
        blocks.leave(chain)
        seq.notes[self.name] = {
            "memory_tokens": chain.memory_tokens,
            "disk_tokens": chain.disk_tokens,
            "documents": [
                segment.title
                for segment in seq.request.segments
                if 0 < chain.pool.num_reusable(segment.end) <= max(chain.memory_tokens, chain.disk_tokens)
            ],
            "discarded": chain.discarded,
        }
        if seq.error is not None or seq.kv.prefix is not None:
            return  # its KV is unknown, or a part of its saved prefix is not loaded
        self._export(seq, chain, cache, seq.kv.num_computed_tokens)
        blocks.park(seq, chain)

    @hookimpl
    def reclaim_blocks(self, lane: Lane, num_blocks: list[int]) -> None:
        cast(Cache, lane.state[self.name]).evict(num_blocks)

    @property
    def _is_exact(self) -> bool:
        return self.exactness_for(self.options) == "identical"

    @property
    def _quota(self) -> int:
        """Disk space in bytes."""
        return int(self.options.disk_gb * 1e9)

    def _on_disk(self, seq: Sequence, chain: Chain, cache: Cache, num_matched: int) -> PrefixMatch | None:
        """A load of a saved prefix, if longer than the match in memory. The first call looks up the rows; the next call reads."""
        disk = cache.disk if self.options.save_documents else None
        ends = [s.end for s in seq.request.segments if self.options.min_tokens <= s.end < seq.num_tokens]
        if disk is None or not ends or disk.is_missed():
            return None
        fingerprint, saved, as_int8 = chain.pool.fingerprint, chain.saved, self.options.int8
        if saved is None:
            keys = [chain.prefix_hash(seq.token_ids, end) for end in ends]
            chain.saved = []

            def look_up() -> Mapping[str, Tensor] | None:
                chain.saved = disk.find(fingerprint, keys, as_int8)
                return None

            looking = disk.submit(look_up)  # always: a look-up renews the date of last use
            return PrefixMatch(loading=looking) if chain.pool.num_reusable(max(ends)) > num_matched else None
        if not saved or saved[0].num_tokens <= num_matched + (WORTH_READING if num_matched else 0):
            return None
        longest, token_ids = saved[0], seq.token_ids[: saved[0].num_tokens]

        kept = _kept(chain.pool, longest.num_tokens)

        def read() -> dict[str, Tensor] | None:
            tensors, reason = disk.read(longest, token_ids, kept, as_int8)
            if tensors is None:
                chain.saved = saved[1:]
                chain.discarded.append(reason)
            elif seq.num_preemptions == 0:
                chain.disk_tokens = longest.num_tokens
            return tensors

        return PrefixMatch(loading=disk.submit(read), num_loading_tokens=longest.num_tokens)

    def _export(self, seq: Sequence, chain: Chain, cache: Cache, num_ready: int) -> None:
        """Copy the KV of uncached documents in pieces. The last piece of a document triggers the write.

        In a KV group with a limit of visible tokens, a piece has only the blocks that the next token behind the document sees.
        The sequence still holds their blocks: the loop drops a block only when no token behind the sealed blocks sees it, and a
        document that ends within the sealed blocks was exported before.
        """
        disk = cache.disk if self.options.save_documents else None
        if disk is None:
            return
        reusable = chain.pool.num_reusable
        num_done = max(seq.kv.num_cached_tokens, chain.num_exported, self.options.min_tokens - 1)
        for segment in [segment for segment in seq.request.segments if reusable(segment.end) > num_done]:
            start, end = chain.num_exported, reusable(segment.end)
            stop = min(reusable(num_ready), end)
            if stop <= start or (stop < end and stop - start < EXPORT_TOKENS):
                return
            self._save(seq, chain, disk, stop, segment)
            chain.num_exported = stop

    def _save(self, seq: Sequence, chain: Chain, disk: Disk, stop: int, document: Segment) -> None:
        """Save the tokens up to `stop`, which are part of a document or its end.

        If the pool reuses whole blocks alone, the file of a document has no token behind its last whole block.
        """
        pool, start = chain.pool, chain.num_exported
        quota, as_int8 = self._quota, self.options.int8
        end = pool.num_reusable(document.end)
        key = chain.prefix_hash(seq.token_ids, document.end) if stop == end else ""
        token_ids = seq.token_ids[:stop]
        kept = _kept(pool, end)
        slots = []
        for group in range(len(pool.groups)):
            parts = [(max(start, part.start), min(stop, part.stop)) for part in pool.kept(group, end)]
            slots.append([slot for low, high in parts if low < high for slot in pool.slots(seq.kv, group, low, high)])

        def sink(tensors: Mapping[str, Tensor]) -> None:
            if chain.num_saved != start:
                return  # a step failed, and an earlier piece is lost
            chain.pieces.append(tensors)
            chain.num_saved = stop
            if stop == end:
                disk.write(pool.fingerprint, key, token_ids, list(chain.pieces), kept, document, quota, as_int8)

        pool.queue.save(slots, sink)


def _kept(pool: Pool, num_tokens: int) -> list[tuple[int, int]]:
    """Per KV group, how many first tokens and how many last tokens of a saved prefix the file holds."""
    return [(len(first), len(last)) for first, last in (pool.kept(g, num_tokens) for g in range(len(pool.groups)))]
