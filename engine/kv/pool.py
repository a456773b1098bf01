"""The owners of KV blocks: sequences and plugins.

A block is `block_size` adjacent slots of one group's store; a sequence's block table lists its blocks in token order. Blocks
are reference counted: every sequence with a block holds one reference, and plugins hold references through `lock`. Before a
sequence writes into a shared block it gets a copy of the block (`fork`, `reserve`). The pool prefers adjacent blocks, so that the
KV of a sequence is few spans. The pool knows no tensors: its changes of KV wait in `queue` for the next forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pitlane.engine.kv.operations import Copy, OperationQueue
from pitlane.engine.kv.state import Column, KVGroup, KVState
from pitlane.engine.kv.visibility import Visibility, visibility_of

DROPPED = -1


class Span(NamedTuple):
    """Adjacent slots of one sequence's KV: slots `[start, stop)` hold the tokens from index `first` on."""

    start: int
    stop: int
    first: int


class BlockAllocator:
    """Reference counts of one group's blocks. locks: the references that plugins hold."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = np.zeros(num_blocks, dtype=np.int32)
        self.locks = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks

    def take(self, count: int, after: int | None) -> list[int]:
        """Take `count` free blocks, adjacent if possible. Try the block behind `after` first."""
        assert count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        taken: list[int] = []
        cursor = self._start(count) if after is None else after + 1
        while len(taken) < count:
            if cursor >= len(self.counts) or self.counts[cursor]:
                cursor = self._start(count - len(taken))
            self.counts[cursor] = 1
            taken.append(cursor)
            cursor += 1
        self.num_free -= count
        return taken

    def share(self, block: int) -> None:
        assert block >= 0 and self.counts[block] > 0, f"block {block} is free and cannot be shared"
        self.counts[block] += 1

    def release(self, block: int) -> None:
        assert block >= 0 and self.counts[block] > 0, f"block {block} is released twice"
        self.counts[block] -= 1
        self.num_free += int(self.counts[block] == 0)

    def _start(self, count: int) -> int:
        """First block of the largest free run. If half a run is enough, its middle: the sequence before it may grow."""
        free = np.flatnonzero(np.diff(np.concatenate(([0], self.counts == 0, [0]))))
        starts, stops = free[::2], free[1::2]
        longest = int(np.argmax(stops - starts))
        start, length = int(starts[longest]), int(stops[longest] - starts[longest])
        return start + length // 2 if start > 0 and length // 2 >= count else start


class Pool:
    """Blocks of all KV groups of one lane. A column is a block id per group.

    visibilities: per group, the tokens that a position sees; without it, those of the model.
    """

    def __init__(
        self,
        groups: SequenceOf[KVGroup],
        num_blocks: int,
        block_size: int,
        fingerprint: str,
        visibilities: SequenceOf[Visibility] | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.visibilities = tuple(visibilities or map(visibility_of, groups))
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.fingerprint = fingerprint  # KV may be shared or saved only under an equal fingerprint
        self.allocators = [BlockAllocator(num_blocks) for _ in groups]
        self.num_withheld = 0
        self.queue = OperationQueue()

    @property
    def num_free_blocks(self) -> int:
        """Columns that can still be taken."""
        return min(allocator.num_free for allocator in self.allocators)

    def withhold(self, num_blocks: int) -> None:
        """Take free columns out of use for good: a draft model uses their memory."""
        for allocator in self.allocators:
            allocator.take(num_blocks, None)
        self.num_withheld += num_blocks

    def num_missing_blocks(self, kv: KVState, num_tokens: int) -> int:
        """Columns to take before a sequence can hold `num_tokens`: new blocks, and copies of shared blocks to write into."""
        have = len(kv.block_tables[0]) if kv.block_tables else 0
        return max(0, -(-num_tokens // self.block_size) - have) + len(self._shared(kv, have))

    def reserve(self, kv: KVState, num_tokens: int) -> bool:
        """Extend the tables of a sequence to hold `num_tokens`; return False, and change nothing, if blocks are lacking.

        A shared block is replaced by a copy of its computed tokens if the sequence will write into it.
        """
        if self.num_missing_blocks(kv, num_tokens) > self.num_free_blocks:
            return False
        tables = self._tables(kv)
        for index in self._shared(kv, len(tables[0])):
            self._copy_block(kv, index)
        missing = -(-num_tokens // self.block_size) - len(tables[0])
        if missing > 0:
            for table, allocator in zip(tables, self.allocators, strict=True):
                table += allocator.take(missing, table[-1] if table and table[-1] != DROPPED else None)
        return True

    def fork(self, kv: KVState, child: KVState) -> None:
        """Share the blocks of all computed tokens with a sequence that has none."""
        count = -(-kv.num_computed_tokens // self.block_size)
        self.adopt(child, [kv.column(index) for index in range(count)])
        child.num_computed_tokens, child.num_cached_tokens = kv.num_computed_tokens, kv.num_cached_tokens
        child.num_sealed_blocks = kv.num_sealed_blocks

    def _shared(self, kv: KVState, stop: int) -> list[int]:
        """Indices below `stop` of the shared columns that the sequence is to write into."""
        start = kv.num_computed_tokens // self.block_size
        return [
            index
            for index in range(start, stop)
            if any(a.counts[table[index]] > 1 for table, a in zip(kv.block_tables, self.allocators, strict=True))
        ]

    def _copy_block(self, kv: KVState, index: int) -> None:
        """Replace column `index` of a sequence by new blocks with a copy of the computed tokens."""
        start = index * self.block_size
        for group, (table, allocator) in enumerate(zip(kv.block_tables, self.allocators, strict=True)):
            old = table[index]
            (table[index],) = allocator.take(1, table[index - 1] if index and table[index - 1] != DROPPED else None)
            allocator.release(old)
            count = min(kv.num_computed_tokens - start, self.block_size)
            if count > 0:
                sources = range(old * self.block_size, old * self.block_size + count)
                self.queue.append(Copy(group, list(sources), self.slots(kv, group, start, start + count)))

    def adopt(self, kv: KVState, blocks: Iterable[Column]) -> None:
        """Share full blocks as the first blocks of a sequence that has none."""
        tables = self._tables(kv)
        assert not tables[0], "only an empty sequence adopts a prefix"
        for column in blocks:
            for table, block, allocator in zip(tables, column, self.allocators, strict=True):
                if block != DROPPED:
                    allocator.share(block)
                table.append(block)
        kv.num_sealed_blocks = len(tables[0])
        kv.num_computed_tokens = len(tables[0]) * self.block_size

    def roll_back(self, kv: KVState, num_tokens: int) -> None:
        """Release the blocks behind the one that holds token `num_tokens - 1`."""
        keep = -(-num_tokens // self.block_size)
        for table, allocator in zip(self._tables(kv), self.allocators, strict=True):
            while len(table) > keep:
                allocator.release(table.pop())

    def drop(self, kv: KVState, num_computed_tokens: int) -> None:
        """Release the blocks that no later token can see."""
        for group, (table, allocator) in enumerate(zip(self._tables(kv), self.allocators, strict=True)):
            for index in range(self.first_seen(group, num_computed_tokens) // self.block_size - 1, -1, -1):
                if table[index] == DROPPED:
                    break
                allocator.release(table[index])
                table[index] = DROPPED

    def first_seen(self, group: int, position: int) -> int:
        """Index of the first token that a position sees in a group."""
        return int(self.visibilities[group].starts(np.array([position]))[0])

    def release(self, kv: KVState) -> None:
        """Give back every block of a sequence."""
        for table, allocator in zip(self._tables(kv), self.allocators, strict=True):
            for block in table:
                if block != DROPPED:
                    allocator.release(block)
        kv.block_tables = []
        kv.num_computed_tokens = kv.num_sealed_blocks = 0

    def lock(self, column: Column) -> None:
        """Hold the blocks of a column, except dropped blocks; they cannot be reused until `unlock`."""
        for block, allocator in zip(column, self.allocators, strict=True):
            if block != DROPPED:
                allocator.share(block)
                allocator.locks[block] += 1

    def unlock(self, column: Column) -> None:
        """Give back the blocks of a locked column."""
        for block, allocator in zip(column, self.allocators, strict=True):
            if block != DROPPED:
                assert allocator.locks[block] > 0, f"block {block} is not locked"
                allocator.locks[block] -= 1
                allocator.release(block)

    def is_idle(self, column: Column) -> bool:
        """Whether a plugin's lock is the only reference to every block of a column."""
        return all(b == DROPPED or a.counts[b] == 1 for b, a in zip(column, self.allocators, strict=True))

    def slots(self, kv: KVState, group: int, start: int, stop: int) -> list[int]:
        """Slots of the tokens `[start, stop)` of a sequence."""
        return [slot for span in self.spans(kv, group, start, stop) for slot in range(span.start, span.stop)]

    def spans(self, kv: KVState, group: int, start: int, stop: int) -> list[Span]:
        """The tokens `[start, stop)` as runs of adjacent slots, none of them empty."""
        table, size = kv.block_tables[group], self.block_size
        spans: list[Span] = []
        for index in range(start // size, -(-stop // size) if start < stop else 0):
            assert table[index] != DROPPED, f"tokens [{start}, {stop}) of group {group} reach into a dropped block"
            low, high = max(start, index * size), min(stop, (index + 1) * size)
            base = (table[index] - index) * size
            if spans and spans[-1].stop == base + low:
                spans[-1] = Span(spans[-1].start, base + high, spans[-1].first)
            else:
                spans.append(Span(base + low, base + high, low))
        return spans

    def check_integrity(self, states: Iterable[KVState], locked: Callable[[], Iterable[Column]] | None = None) -> None:
        """Assert that counts equal the references of `states` plus the locks, and that free counts agree.

        locked: the columns that plugins hold, one entry per lock. If it is None, the locks are not checked.
        """
        states = list(states)
        for index, allocator in enumerate(self.allocators):
            held = [block for kv in states if kv.block_tables for block in kv.block_tables[index]]
            references = _histogram(held, allocator.counts)
            if locked is not None:
                locks = _histogram([column[index] for column in locked()], allocator.counts)
                assert (locks == allocator.locks).all(), f"group {index}: counts differ from what plugins hold"
            differing = np.flatnonzero(references + allocator.locks != allocator.counts)
            withheld = (references[differing] == 0) & (allocator.counts[differing] == 1)
            assert len(differing) == withheld.sum() == self.num_withheld, (
                f"group {index}: counts differ from references"
            )
            assert allocator.num_free == int((allocator.counts == 0).sum()), f"group {index}: free count is off"

    def _tables(self, kv: KVState) -> list[list[int]]:
        if not kv.block_tables:
            kv.block_tables = [[] for _ in self.groups]
        return kv.block_tables


def _histogram(blocks: list[int], counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count how often every block id is in `blocks`, without dropped blocks."""
    ids = np.array(blocks, dtype=np.int64)
    return np.bincount(ids[ids != DROPPED], minlength=len(counts))
