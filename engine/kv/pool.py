"""The owners of KV blocks: sequences and plugins.

A block is `block_size` adjacent slots of one group's store; a sequence's block table lists its blocks in token order. Blocks
are reference counted: every sequence with a block holds one reference, and plugins hold references through `lock`. Before a
sequence writes into a shared block it gets a copy of the block (`fork`, `reserve`). Every group has its own number of blocks. In a
group with a limit of visible tokens, a sequence holds a bounded number of blocks: `reserve` takes blocks as far as the next forward
may write, and `drop` gives back the blocks that no later token sees: blocks before the window, except the blocks of the sinks.
`evict` gives back chosen blocks. The pool prefers adjacent blocks, so that the KV of a sequence is few runs of slots. The pool
knows no tensors: its changes of KV wait in `queue` for the next forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from math import inf

from pitlane.engine.kv.allocator import BlockAllocator
from pitlane.engine.kv.operations import Copy, OperationQueue
from pitlane.engine.kv.reach import DROPPED as DROPPED
from pitlane.engine.kv.reach import Reach
from pitlane.engine.kv.state import Column, KVGroup, KVState
from pitlane.engine.kv.visibility import Visibility, visibility_of

# Dropped blocks leave the table of a batch in multiples of so many blocks (2,048 tokens). Kernels sum the keys in pieces of 512
# places; with whole multiples, a key keeps its place in a piece, so sums keep their order and their bits.
NUM_LEFT_OUT = 64


class Pool:
    """Blocks of all KV groups of one lane. A column is a block id per group.

    num_blocks: of every group. visibilities: per group, the tokens that a position sees; without it,
    those of the model. max_step_tokens: the most tokens of a forward; without it, the pool bounds nothing and drops no block.
    whole_blocks: a cached or saved prefix is reused in whole blocks (see `KVStorePlan`). saved_dims: last dimension of the saved
    tensors of every group; without it, the size of a head.
    """

    def __init__(
        self,
        groups: SequenceOf[KVGroup],
        num_blocks: SequenceOf[int],
        block_size: int,
        fingerprint: str,
        visibilities: SequenceOf[Visibility] | None = None,
        max_step_tokens: int | None = None,
        whole_blocks: bool = False,
        saved_dims: SequenceOf[int] | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.visibilities = tuple(visibilities or map(visibility_of, groups))
        self.block_size, self.whole_blocks = block_size, whole_blocks
        self.saved_dims = tuple(saved_dims or (group.head_dim for group in groups))
        self.fingerprint = fingerprint  # KV may be shared or saved only under an equal fingerprint
        self.allocators = [BlockAllocator(count) for count in num_blocks]
        self.reaches = [Reach.of(v, max_step_tokens, block_size) for v in self.visibilities]
        self.max_blocks = [reach.max_blocks for reach in self.reaches]
        self.num_sink_blocks = [reach.num_sink_blocks for reach in self.reaches]
        # Per group with an `Eviction`: tokens between two evictions.
        self.intervals = {g: reach.interval for g, reach in enumerate(self.reaches) if reach.interval is not None}
        self.withheld = [0] * len(groups)
        self.queue = OperationQueue()

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return sum(len(allocator.counts) for allocator in self.allocators)

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of all groups."""
        return sum(allocator.num_free for allocator in self.allocators)

    @property
    def num_withheld(self) -> int:
        """Blocks of all groups that are out of use."""
        return sum(self.withheld)

    @property
    def num_usable_tokens(self) -> float:
        """The most tokens that a sequence can have in blocks that are not withheld; infinite if no group bounds it."""
        usable = [len(a.counts) - withheld for a, withheld in zip(self.allocators, self.withheld, strict=True)]
        limited = [n for n, limit in zip(usable, self.max_blocks, strict=True) if limit is None or n < limit]
        return min(limited, default=inf) * self.block_size

    @property
    def is_endless(self) -> bool:
        """Whether a sequence may grow without end: all groups drop blocks, and sinks keep the distances small."""
        return None not in self.max_blocks and any(self.num_sink_blocks)

    def num_before_eviction(self, num_computed_tokens: int) -> float:
        """The most tokens of the next forward of a sequence: it ends at the next eviction. Infinite if no group evicts blocks."""
        return min((n - num_computed_tokens % n for n in self.intervals.values()), default=inf)

    @property
    def paying_groups(self) -> list[int]:
        """The groups without a limit of visible tokens; all groups if every group has a limit."""
        groups = range(len(self.groups))
        return [group for group in groups if self.max_blocks[group] is None] or list(groups)

    def withhold(self, num_blocks: int) -> None:
        """Take free blocks of the paying groups out of use for good: a draft model uses their memory."""
        for group in self.paying_groups:
            self.allocators[group].take(num_blocks, None)
            self.withheld[group] += num_blocks

    def num_missing(self, kv: KVState, num_tokens: int) -> list[int]:
        """Blocks to take per group before a sequence can hold `num_tokens`: new blocks, and copies of blocks to write into."""
        return [
            max(0, self.reaches[group].end(self.reaches[group].num_dropped(table), num_tokens) - len(table))
            + len(self._shared(kv, group))
            for group, table in enumerate(kv.block_tables or [[] for _ in self.groups])
        ]

    def num_missing_behind(self, num_cached_tokens: int, num_blocks: int, num_tokens: int) -> list[int]:
        """Blocks to take per group before a new sequence can hold `num_tokens`.

        Its first `num_cached_tokens` tokens come from a cache: it shares `num_blocks` full blocks, and gets the rest as a copy.
        """
        gaps = [reach.gap(num_cached_tokens) for reach in self.reaches]
        return [
            max(0, self.reaches[group].end(len(gap), num_tokens) - max(gap.stop, num_blocks))
            + max(0, gap.start - num_blocks)
            if gap
            else max(0, self.reaches[group].end(0, num_tokens) - num_blocks)
            for group, gap in enumerate(gaps)
        ]

    def lacking(self, num_missing: SequenceOf[int]) -> list[int]:
        """Per group, how many of `num_missing` blocks are not free."""
        return [max(0, count - a.num_free) for count, a in zip(num_missing, self.allocators, strict=True)]

    def reserve(self, kv: KVState, num_tokens: int) -> bool:
        """Extend the tables of a sequence to hold `num_tokens`; return False, and change nothing, if blocks are lacking.

        A limited group gets blocks up to `max_blocks` alone: enough for the next forward. A shared block is replaced by a copy of
        its computed tokens if the sequence will write into it.
        """
        num_missing = self.num_missing(kv, num_tokens)
        if not any(num_missing):
            self._tables(kv)
            return True
        if any(self.lacking(num_missing)):
            return False
        for group, (table, allocator) in enumerate(zip(self._tables(kv), self.allocators, strict=True)):
            for index in self._shared(kv, group):
                self._copy_block(kv, group, index)
            missing = self.reaches[group].end(self.reaches[group].num_dropped(table), num_tokens) - len(table)
            if missing > 0:
                after = table[-1] if table and table[-1] != DROPPED else None
                table += allocator.take(missing, after, self.max_blocks[group] is not None)
        return True

    def kept(self, group: int, num_tokens: int) -> tuple[range, range]:
        """The tokens of a group that a saved prefix of `num_tokens` tokens must hold: see `Reach.kept`."""
        return self.reaches[group].kept(num_tokens)

    def num_reusable(self, num_tokens: int) -> int:
        """Return how many of the first `num_tokens` tokens of a cached or saved prefix a sequence can use."""
        return num_tokens // self.block_size * self.block_size if self.whole_blocks else num_tokens

    def fork(self, kv: KVState, child: KVState) -> None:
        """Share the blocks of all computed tokens with a sequence that has none."""
        count = -(-kv.num_computed_tokens // self.block_size)
        self._adopt(child, [kv.column(index) for index in range(count)], kv.num_computed_tokens)
        child.num_cached_tokens, child.num_sealed_blocks = kv.num_cached_tokens, kv.num_sealed_blocks
        child.scores = {group: dict(scores) for group, scores in kv.scores.items()}

    def adopt(self, kv: KVState, blocks: SequenceOf[Column]) -> None:
        """Share full blocks as the first blocks of a sequence that has none."""
        self._adopt(kv, blocks, len(blocks) * self.block_size)
        kv.num_sealed_blocks = len(blocks)

    def adopt_loaded(self, kv: KVState, num_tokens: int) -> None:
        """Prepare a sequence that has no blocks for saved KV of its first tokens: drop the blocks that no later token sees."""
        self._adopt(kv, (), num_tokens)
        kv.num_computed_tokens = 0

    def _adopt(self, kv: KVState, columns: SequenceOf[Column], num_tokens: int) -> None:
        assert not kv.block_tables, "only an empty sequence adopts a prefix"
        for group, (table, allocator) in enumerate(zip(self._tables(kv), self.allocators, strict=True)):
            gap = self.reaches[group].gap(num_tokens)
            for index, column in enumerate(columns):
                block = DROPPED if index in gap else column[group]
                table.append(block)
                if block != DROPPED:
                    allocator.share(block)
            if (
                gap and not columns
            ):  # saved KV will be loaded; room for the blocks of the sinks was checked before admission
                table += [*(allocator.take(gap.start, None) if gap.start else ()), *[DROPPED] * len(gap)]
        kv.num_computed_tokens = num_tokens

    def _shared(self, kv: KVState, group: int) -> list[int]:
        """Indices of the shared blocks of a group that the sequence is to write into."""
        if not kv.block_tables:
            return []
        table, counts = kv.block_tables[group], self.allocators[group].counts
        start, num_dropped = kv.num_computed_tokens // self.block_size, self.reaches[group].num_dropped(table)
        if num_dropped:
            start = max(start, self.num_sink_blocks[group] + num_dropped)
        return [index for index in range(start, len(table)) if counts[table[index]] > 1]

    def _copy_block(self, kv: KVState, group: int, index: int) -> None:
        """Replace block `index` of a sequence by a new block with a copy of the computed tokens."""
        table, allocator, start = kv.block_tables[group], self.allocators[group], index * self.block_size
        old = table[index]
        (table[index],) = allocator.take(1, table[index - 1] if index and table[index - 1] != DROPPED else None)
        allocator.release(old)
        count = min(kv.num_computed_tokens - start, self.block_size)
        if count > 0:
            sources = range(old * self.block_size, old * self.block_size + count)
            self.queue.append(Copy(group, list(sources), self.slots(kv, group, start, start + count)))

    def roll_back(self, kv: KVState, num_tokens: int) -> None:
        """Release the blocks behind the one that holds token `num_tokens - 1`."""
        keep = -(-num_tokens // self.block_size)
        for table, allocator in zip(self._tables(kv), self.allocators, strict=True):
            while len(table) > keep:
                allocator.release(table.pop())

    def drop(self, kv: KVState, num_computed_tokens: int) -> None:
        """Release the blocks that no token behind the first `num_computed_tokens` sees."""
        for group, (table, allocator) in enumerate(zip(self._tables(kv), self.allocators, strict=True)):
            first = self.first_seen(group, num_computed_tokens) // self.block_size
            for index in range(first - 1, self.num_sink_blocks[group] - 1, -1):
                if table[index] == DROPPED:
                    break
                allocator.release(table[index])
                table[index] = DROPPED

    def evict(self, kv: KVState, group: int, indices: Iterable[int]) -> None:
        """Release full blocks of a sequence in one group; no later token sees them."""
        table, allocator = kv.block_tables[group], self.allocators[group]
        for index in indices:
            assert (index + 1) * self.block_size <= kv.num_computed_tokens, f"block {index} is not full"
            allocator.release(table[index])
            table[index] = DROPPED

    def first_seen(self, group: int, position: int) -> int:
        """Index of the first token that a position sees in a group; 0 if the pool drops no block of the group."""
        return self.reaches[group].first_seen(position)

    def release(self, kv: KVState) -> None:
        """Give back every block of a sequence."""
        for table, allocator in zip(self._tables(kv), self.allocators, strict=True):
            for block in table:
                if block != DROPPED:
                    allocator.release(block)
        kv.block_tables, kv.scores = [], {}
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
        table, size = kv.block_tables[group], self.block_size
        slots: list[int] = []
        for index in range(start // size, -(-stop // size) if start < stop else 0):
            assert table[index] != DROPPED, f"tokens [{start}, {stop}) of group {group} reach into a dropped block"
            first = (table[index] - index) * size
            slots += range(first + max(start, index * size), first + min(stop, (index + 1) * size))
        return slots

    def table_of_batch(self, kv: KVState, group: int) -> tuple[list[int], int]:
        """Return the block table of a sequence without blocks that no token of the next forward sees, and how many are left out.

        Evicted blocks are left out. If sequences grow without end, dropped blocks before the window are left out too, as soon as
        all groups with sinks drop blocks: else the tables, and the time of a step, would grow with the text.
        """
        table = kv.block_tables[group]
        if group in self.intervals:
            held = [block for block in table if block != DROPPED]
            return held, len(table) - len(held)
        if not self.is_endless or kv.num_computed_tokens < max(v.max_tokens or 0 for v in self.visibilities):
            return table, 0
        first = self.num_sink_blocks[group]
        count = self.reaches[group].num_dropped(table) // NUM_LEFT_OUT * NUM_LEFT_OUT
        return (table[:first] + table[first + count :], count) if count else (table, 0)

    @property
    def groups_with_lost_blocks(self) -> list[int]:
        """If no sequence has blocks: the groups with blocks in use that no plugin locks and no draft model pays for."""
        pairs = enumerate(zip(self.allocators, self.withheld, strict=True))
        return [group for group, (a, withheld) in pairs if (a.counts != a.locks).sum() != withheld]

    def _tables(self, kv: KVState) -> list[list[int]]:
        if not kv.block_tables:
            kv.block_tables = [[] for _ in self.groups]
        return kv.block_tables
