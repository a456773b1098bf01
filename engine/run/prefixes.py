"""Prefixes of a lane's sequences: asks the plugins for existing KV, and brings it into the store.

A prefix is a run of cached blocks, or saved KV that a plugin loads. The scheduler decides when a sequence is admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from math import inf
from typing import TYPE_CHECKING

from pitlane.engine.kv.operations import Copy, Load
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState, PrefixMatch
from pitlane.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

LOAD_RATE = 1.5e9  # bytes per second: a low estimate for writing saved KV into new pages of the store

Match = Callable[[Sequence], PrefixMatch | None]


class Prefixes:
    """Knows the pool of a lane and no scheduler. match: asks the plugins for the prefix of a sequence."""

    def __init__(self, pool: Pool, match: Match) -> None:
        self.pool = pool
        self.match = match

    def find(self, seq: Sequence) -> PrefixMatch:
        """Return the match of a plugin, or an empty match if it leaves no token to compute or cannot be read."""
        match = self.match(seq) or PrefixMatch()
        if match.num_loading_tokens == 0 and is_unreadable(match):
            match = self.match(seq) or PrefixMatch()  # the look-up has ended: this call returns its outcome
        if self.pool.whole_blocks:
            match.tail = None
        count = match.num_loading_tokens
        if match.loading is None:
            count = len(match.blocks) * self.pool.block_size + (match.tail[1] if match.tail is not None else 0)
        return PrefixMatch() if count >= seq.num_tokens or is_unreadable(match) else match

    def is_wrong(self, prefix: PrefixMatch) -> bool:
        """Whether the loaded tensors of a prefix lack a group, or tokens, or have another shape."""
        if prefix.loading is None:
            return False
        tensors, count = prefix.loading.result(), prefix.num_loading_tokens
        for index, group in enumerate(self.pool.groups):
            tensor = tensors.get(f"group.{index}") if isinstance(tensors, Mapping) else None
            *shape, num_tokens, dim = getattr(tensor, "shape", (0, 0))
            expected = [2, len(group.layers), group.num_kv_heads, self.pool.saved_dims[index]]
            sinks, window = self.pool.kept(index, count)
            num_kept = len(sinks) + len(window)
            if [*shape, dim] != expected or num_tokens < num_kept or (sinks and num_tokens != num_kept):
                return True
        return False

    def use(self, seq: Sequence, prefix: PrefixMatch) -> None:
        """Give the blocks of a prefix to an admitted sequence, or blocks for the KV that `load` writes."""
        pool = self.pool
        if prefix.loading is not None:
            seq.kv.prefix = prefix  # `load` clears it when the whole prefix is in the store
            pool.adopt_loaded(seq.kv, prefix.num_loading_tokens)
            return
        pool.adopt(seq.kv, prefix.blocks)
        if prefix.tail is not None:
            self._copy_tail(seq, *prefix.tail)
        self._used_prefix(seq)

    def load(self, running: SequenceOf[Sequence], seconds: float | None) -> None:
        """Write saved prefixes into the store, for about this number of seconds; None = the whole prefixes."""
        room = inf if seconds is None else seconds * LOAD_RATE
        for seq in running:
            kv = seq.kv
            if kv.prefix is None or room <= 0:
                continue
            assert kv.prefix.loading is not None, "blocks are adopted at once"
            tensors, count = kv.prefix.loading.result(), kv.prefix.num_loading_tokens
            assert tensors is not None, "unreadable prefixes are not admitted"
            per_token = sum(tensor.nbytes for tensor in tensors.values()) / count  # a low estimate
            start, end = kv.num_computed_tokens, self.pool.num_reusable(count)
            stop = min(end, start + 1 + int(min(count, room / max(1.0, per_token))))
            self.pool.queue.append(self._load_operation(kv, tensors, start, stop, count))
            room -= (stop - start) * per_token
            kv.num_computed_tokens = stop
            if stop == end:
                kv.prefix = None
                self._used_prefix(seq)

    def _load_operation(self, kv: KVState, tensors: Mapping[str, Tensor], start: int, stop: int, count: int) -> Load:
        """Load the tokens `[start, stop)` of `count` saved tokens. A tensor lacks tokens that no later token sees.

        A tensor ends with the last of the saved tokens. So the place of a token in it follows from the number of tokens behind.
        """
        slots, starts = [], []
        for group in range(len(self.pool.groups)):
            wanted: list[int] = []
            num_left = 0
            for kept in self.pool.kept(group, count):
                first, end = max(start, kept.start), min(stop, kept.stop)
                wanted += self.pool.slots(kv, group, first, end) if first < end else []
                num_left += max(0, kept.stop - first)
            slots.append(wanted)
            starts.append(tensors[f"group.{group}"].shape[3] - num_left)
        return Load(slots, tensors, starts)

    @staticmethod
    def _used_prefix(seq: Sequence) -> None:
        kv = seq.kv
        assert kv.num_computed_tokens < seq.num_tokens, "a prefix leaves a token to compute"
        kv.num_cached_tokens = max(kv.num_cached_tokens, min(kv.num_computed_tokens, seq.request.num_prompt_tokens))

    def _copy_tail(self, seq: Sequence, column: tuple[int, ...], count: int) -> None:
        pool, start = self.pool, seq.kv.num_computed_tokens
        if not pool.reserve(seq.kv, start + count):
            return
        for group, block in enumerate(column):
            sources = list(range(block * pool.block_size, block * pool.block_size + count))
            self.pool.queue.append(Copy(group, sources, pool.slots(seq.kv, group, start, start + count)))
        seq.kv.num_computed_tokens += count


def is_pending(seq: Sequence) -> bool:
    prefix = seq.kv.prefix
    return prefix is not None and prefix.loading is not None and not prefix.loading.done()


def is_unreadable(prefix: PrefixMatch) -> bool:
    loading = prefix.loading
    if loading is None or not loading.done():
        return False
    if loading.cancelled() or loading.exception() is not None:
        return True
    return loading.result() is None or prefix.num_loading_tokens < 1
