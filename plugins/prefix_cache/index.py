"""Index of the blocks in memory: finds cached prefixes, orders eviction, and knows which sequence computes a block now.

A hit also compares the token ids. A cached block is a `Column`: a block id per KV group. In a KV group with a limit of visible
tokens, the block may be dropped (-1): a match needs such blocks only for the tokens that the next token sees. Only the engine's
thread uses this module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from pitlane import Pool, PrefixMatch, Sequence
from pitlane.plugins.prefix_cache.chain import Chain, Pending, block_hash

Column = tuple[int, ...]
MAX_CHILDREN = 16  # per block, number of continuations to compare for a partial match
MIN_AWAITED = 4  # wait only if another request computes at least so many blocks; computing fewer twice is faster


@dataclass(slots=True)
class Entry:
    """A cached block. token_ids: fewer than a full block at the end of a sequence. parent: identity of the block before it.

    index: number of blocks before it. use: number of the latest use; a key of `BlockIndex.uses`.
    """

    index: int
    token_ids: list[int]
    column: Column
    parent: bytes
    use: int


class Uses(OrderedDict[int, dict[bytes, None]]):
    """Number of a use -> the blocks of that use, in prompt order; least recent use first."""

    def add(self, use: int, key: bytes) -> None:
        self.setdefault(use, {})[key] = None

    def remove(self, use: int, key: bytes) -> None:
        del self[use][key]
        if not self[use]:
            del self[use]


class BlockIndex:
    """Cached blocks of one pool.

    uses: all cached blocks. Eviction takes columns from the end of a use, so that no block outlives its parent. limited: per KV
    group with a limit of visible tokens, the cached blocks that are not dropped in this group. Such a group can give back blocks
    while the other groups keep theirs. It begins at the start of a use, because a match needs the last blocks. The blocks of sinks
    come last, because every match needs them.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.entries: dict[bytes, Entry] = {}
        self.children: dict[bytes, dict[bytes, None]] = {}
        self.uses = Uses()
        groups = range(len(pool.groups))
        self.limited = {group: Uses() for group in groups if pool.visibilities[group].max_tokens is not None}
        self.computing: dict[bytes, Chain] = {}
        self._num_uses = 0

    def match(self, token_ids: list[int], chain: Chain) -> PrefixMatch:
        """Match the longest cached prefix, without the last token: it must be computed for its logits."""
        size = self.pool.block_size
        columns: list[Column] = []
        hashes = chain.upto(token_ids, (len(token_ids) - 1) // size)
        for index, key in enumerate(hashes):
            entry = self.entries.get(key)
            if entry is None or entry.token_ids != token_ids[index * size : (index + 1) * size]:
                break
            columns.append(entry.column)
        match = PrefixMatch(columns[: self._longest(columns)])
        self._use(chain, hashes[: len(match.blocks)])
        if not self.pool.whole_blocks:
            match.tail = self._tail(token_ids[len(match.blocks) * size : -1], chain.parent(len(match.blocks)))
        return match

    def _longest(self, columns: list[Column]) -> int:
        """Return the largest number of leading columns that hold all tokens that the next token sees."""
        return next((count for count in range(len(columns), 0, -1) if self._is_whole(columns[:count])), 0)

    def _is_whole(self, columns: SequenceOf[Column]) -> bool:
        """Whether leading columns hold all tokens that the next token sees."""
        count, size = len(columns), self.pool.block_size
        for group in self.limited:
            first = self.pool.first_seen(group, count * size) // size
            seen = [*range(min(first, self.pool.num_sink_blocks[group])), *range(first, count)]
            if any(columns[index][group] < 0 for index in seen):
                return False
        return True

    def wait_for(self, chain: Chain, num_matched: int) -> Pending | None:
        """A future that completes when another sequence has sealed the missing blocks that both share.

        If fewer than MIN_AWAITED blocks are shared, returns None. This chain then owns its missing blocks that no
        other chain computes. A waiting chain owns no blocks: so no two chains wait for each other.
        """
        missing = chain.hashes[num_matched:]
        num_awaited, owner = 0, None
        for key in missing:
            computing_chain = self.computing.get(key)
            if computing_chain is None or computing_chain is chain:
                break
            num_awaited, owner = num_awaited + 1, computing_chain
        if owner is None or num_awaited < MIN_AWAITED:
            for key in missing:
                self.computing.setdefault(key, chain)
            return None
        self.leave(chain)
        waiting: Pending = Future()
        owner.awaited.setdefault(missing[num_awaited - 1], []).append(waiting)
        return waiting

    def leave(self, chain: Chain) -> None:
        """Give up all blocks of this sequence and wake their waiters. Called when it waits itself, ends, or loses the plugin."""
        for key in chain.hashes:
            if self.computing.get(key) is chain:
                del self.computing[key]
        for key in list(chain.awaited):
            chain.tell(key)

    @contextmanager
    def leaving_on_error(self, chain: Chain) -> Iterator[None]:
        """On an exception, wake the waiters now: the engine drops the plugin from the sequence's plan and calls no later hook."""
        try:
            yield
        except BaseException:
            self.leave(chain)
            raise

    def insert(self, seq: Sequence, index: int, chain: Chain) -> None:
        """Cache a sealed block. If an equal block is cached, keep the cached block."""
        size = self.pool.block_size
        key = chain.upto(seq.token_ids, index + 1)[index]
        token_ids = seq.token_ids[index * size : (index + 1) * size]
        self._enter(key, index, token_ids, seq.kv.column(index), chain.parent(index), chain)
        if self.computing.get(key) is chain:
            del self.computing[key]
        chain.tell(key)

    def park(self, seq: Sequence, chain: Chain) -> None:
        """Cache all computed tokens of a finished sequence for the next turn, the last partial block included if it can be used."""
        size = self.pool.block_size
        count, rest = divmod(seq.kv.num_computed_tokens, size)
        self._use(chain, chain.upto(seq.token_ids, count))
        if rest and not self.pool.whole_blocks:
            parent, token_ids = chain.parent(count), seq.token_ids[count * size : count * size + rest]
            self._enter(block_hash(parent, token_ids), count, token_ids, seq.kv.column(count), parent, chain)

    def evict(self, num_blocks: list[int]) -> list[int]:
        """Free up to `num_blocks` of each KV group: the least recently used blocks that no sequence holds. Returns the rest."""
        rest = list(num_blocks)
        for group, uses in self.limited.items():
            for key in (key for keys in list(uses.values()) for key in self._sinks_last(keys, group)):
                if rest[group] <= 0:
                    break
                column = _alone(self.entries[key].column, group)
                if self.pool.is_idle(column):
                    self._release(key, column)
                    rest[group] -= 1
        others = [group for group in range(len(rest)) if group not in self.limited]
        for keys in list(self.uses.values()):
            while keys and any(rest[group] > 0 for group in others):
                key = next(reversed(keys))
                column = self.entries[key].column
                if not all(self.pool.is_idle(_alone(column, group)) for group in others):
                    break  # a sequence holds this block, so it holds all earlier blocks too
                self._drop(key)
                rest = [count - (block >= 0) for count, block in zip(rest, column, strict=True)]
        return rest

    def _sinks_last(self, keys: dict[bytes, None], group: int) -> list[bytes]:
        return sorted(keys, key=lambda key: self.entries[key].index < self.pool.num_sink_blocks[group])

    def _use(self, chain: Chain, keys: SequenceOf[bytes]) -> None:
        """Mark blocks as used now: eviction takes them last."""
        self._num_uses += 1
        chain.use = self._num_uses
        for key in keys:
            entry = self.entries.get(key)
            if entry is not None:
                for uses in self._uses_of(entry.column):
                    uses.remove(entry.use, key)
                    uses.add(chain.use, key)
                entry.use = chain.use

    def _uses_of(self, column: Column) -> list[Uses]:
        return [self.uses, *(uses for group, uses in self.limited.items() if column[group] >= 0)]

    def _enter(self, key: bytes, index: int, token_ids: list[int], column: Column, parent: bytes, chain: Chain) -> None:
        entry = self.entries.get(key)
        if entry is not None:
            self._fill(key, entry, column)
            return
        siblings = self.children.setdefault(parent, {})
        for other in [
            sibling
            for sibling in islice(reversed(siblings), MAX_CHILDREN)
            if _begins(token_ids, self.entries[sibling].token_ids)
        ]:
            self._drop(other)
        self.pool.lock(column)
        self.entries[key] = Entry(index, token_ids, column, parent, chain.use)
        self.children.setdefault(parent, {})[key] = None
        for uses in self._uses_of(column):
            uses.add(chain.use, key)

    def _fill(self, key: bytes, entry: Entry, column: Column) -> None:
        """Take the blocks of an equal column where the entry has dropped blocks."""
        new = tuple(b if a < 0 else -1 for a, b in zip(entry.column, column, strict=True))
        self.pool.lock(new)
        entry.column = tuple(max(pair) for pair in zip(entry.column, new, strict=True))
        for group, uses in self.limited.items():
            if new[group] >= 0:
                uses.add(entry.use, key)

    def _release(self, key: bytes, part: Column) -> None:
        """Give back the blocks of a part of a column. Remove the entry, and its parents, if they are childless without a block."""
        entry = self.entries[key]
        for group, uses in self.limited.items():
            if part[group] >= 0:
                uses.remove(entry.use, key)
        entry.column = tuple(-1 if b >= 0 else a for a, b in zip(entry.column, part, strict=True))
        self.pool.unlock(part)
        while key in self.entries and key not in self.children and max(self.entries[key].column) < 0:
            parent = self.entries[key].parent
            self._drop(key)
            key = parent

    def _drop(self, key: bytes) -> None:
        entry = self.entries.pop(key)
        for uses in self._uses_of(entry.column):
            uses.remove(entry.use, key)
        siblings = self.children[entry.parent]
        del siblings[key]
        if not siblings:
            del self.children[entry.parent]
        self.pool.unlock(entry.column)

    def _tail(self, token_ids: list[int], parent: bytes) -> tuple[Column, int] | None:
        """The cached child of `parent` with the longest common prefix with `token_ids`, and its length."""
        best, length = None, 0
        for key in islice(reversed(self.children.get(parent, {})), MAX_CHILDREN):
            entry = self.entries[key]
            common = next((i for i, (a, b) in enumerate(zip(entry.token_ids, token_ids, strict=False)) if a != b), None)
            common = min(len(entry.token_ids), len(token_ids)) if common is None else common
            if common > length and min(entry.column) >= 0:
                best, length = entry.column, common
        return (best, length) if best is not None else None


def _alone(column: Column, group: int) -> Column:
    """A column with the block of one group. The blocks of the other groups count as dropped."""
    return tuple(block if index == group else -1 for index, block in enumerate(column))


def _begins(longer: list[int], shorter: list[int]) -> bool:
    return len(shorter) < len(longer) and longer[: len(shorter)] == shorter
