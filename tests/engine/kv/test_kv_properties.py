"""Random sequences of admit, extend, draft, fork, roll back, preempt, cache, evict and abort, against plain Python.

There are two worlds. `PoolWorld` calls the pool directly, beside a model of plain objects that count the holders of each block.
`SchedulerWorld` runs requests: its language model reads the whole context from the store, so a block that is lost, shared or copied
wrongly changes an answer. In both worlds the store holds one token id per slot, and operations wait in the pool's queue until the
next write of tokens, as they wait for the next forward in the engine: meanwhile their blocks may be freed and reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pitlane import Copy, PrefixMatch, SamplingParams, Save, Sequence, Visibility
from pitlane.engine.kv.pool import DROPPED, Pool
from pitlane.engine.kv.state import Column, KVGroup
from pitlane.engine.kv.visibility import num_sinks_of, visibility_of
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.run.scheduler import Scheduler
from pitlane.engine.sequence import Request, Timing
from pitlane.plugins.attention_sinks import SinkWindow
from tests.integrity import assert_integrity

SIZE = 4
STEP = 12  # the most tokens of a forward
FULL = KVGroup((0,), 1, 8)
WINDOWED = KVGroup((1,), 1, 8, window=6)
SINKING = KVGroup((2,), 1, 8)
SINKS = SinkWindow(5, 8, 4)  # two blocks of sinks
GROUPS = [(FULL,), (WINDOWED,), (FULL, WINDOWED), (SINKING,), (FULL, SINKING), (WINDOWED, SINKING)]
Step = tuple[str, int, int]


def visibilities_of(groups: tuple[KVGroup, ...]) -> list[Visibility]:
    return [visibility_of(group, SINKS if group is SINKING else None) for group in groups]


def steps_of(operations: list[str], max_size: int) -> st.SearchStrategy[list[Step]]:
    number = st.integers(0, 99)
    return st.lists(st.tuples(st.sampled_from(operations), number, number), max_size=max_size)


def example_counts(count: int) -> Any:
    """The default tier runs a tenth of the examples."""
    return pytest.mark.parametrize("examples", [count // 10, pytest.param(count, marks=pytest.mark.slow)])


def run_examples(examples: int, strategy: st.SearchStrategy[Any], check: Any) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    options = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=quiet
    )
    options(given(strategy)(check))()


def make_seq(number: int, token_ids: list[int], sample_ids: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        id=number,
        request=Request(len(token_ids), SamplingParams(), seed=0, sample_ids=sample_ids),
        plan=cast(Any, None),
        token_ids=token_ids,
        detokenizer=cast(Any, None),
        timing=Timing(0.0),
    )


class Stores:
    """Token ids by group and slot."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.slots: list[list[int]] = [[-1] * (len(allocator.counts) * SIZE) for allocator in pool.allocators]

    def carry_out(self) -> None:
        """Carry out the waiting operations: a forward does this first."""
        saved: dict[int, Any] = {}
        for operation in self.pool.queue.take():
            if isinstance(operation, Save):
                saved[operation.key] = [
                    [store[slot] for slot in slots] for store, slots in zip(self.slots, operation.slots, strict=True)
                ]
                continue
            assert isinstance(operation, Copy)
            store = self.slots[operation.group]
            for target, token in zip(operation.targets, [store[slot] for slot in operation.sources], strict=True):
                store[target] = token
        self.pool.queue.deliver(saved)

    def write(self, seq: Sequence, start: int, token_ids: list[int]) -> None:
        """Write tokens, as a forward does."""
        self.carry_out()
        for group, store in enumerate(self.slots):
            for slot, token in zip(
                self.pool.slots(seq.kv, group, start, start + len(token_ids)), token_ids, strict=True
            ):
                store[slot] = token

    def assert_holds(self, seq: Sequence) -> None:
        """Assert that the next token of a sequence sees the sequence's own computed tokens."""
        stop = seq.kv.num_computed_tokens
        if not stop:
            return
        for group, store in enumerate(self.slots):
            visibility = self.pool.visibilities[group]
            start = int(visibility.starts(np.array([stop]))[0])
            for low, high in ((0, min(start, num_sinks_of(visibility))), (start, stop)):
                stored = [store[slot] for slot in self.pool.slots(seq.kv, group, low, high)]
                assert stored == seq.token_ids[low:high], f"group {group} of sequence {seq.id}"


# ---- the pool


@dataclass(eq=False)
class Block:
    """A block of the plain model."""

    num_holders: int = 1


@dataclass
class Cached:
    """Full blocks in a cache, and their tokens."""

    columns: list[Column]
    blocks: list[list[Block | None]]  # by group
    token_ids: list[int]


@dataclass
class PoolWorld:
    """A pool and its plain model. model: per sequence id and group a list of blocks, None = dropped."""

    groups: tuple[KVGroup, ...]
    num_blocks: list[int]
    seqs: list[Sequence] = field(default_factory=list)
    model: dict[int, list[list[Block | None]]] = field(default_factory=dict)
    cache: list[Cached] = field(default_factory=list)
    count: int = 0
    num_saves: int = 0
    num_saved: int = 0

    def __post_init__(self) -> None:
        seen = visibilities_of(self.groups)
        self.pool = Pool(self.groups, self.num_blocks, SIZE, "fingerprint", seen, max_step_tokens=STEP)
        self.stores = Stores(self.pool)

    def blocks(self, group: int) -> set[Block]:
        held = {block for tables in self.model.values() for block in tables[group] if block is not None}
        return held | {block for entry in self.cache for block in entry.blocks[group] if block is not None}

    def num_free(self, group: int) -> int:
        return self.num_blocks[group] - len(self.blocks(group))

    def dropped(self, group: int, num_tokens: int) -> range:
        """The blocks that a token behind `num_tokens` tokens does not see. The first two blocks hold sinks."""
        if self.groups[group] is SINKING:
            start = 0
            while num_tokens - start >= SINKS.window:
                start += SINKS.stride
            return range(2, start // SIZE)
        window = self.groups[group].window
        return range(0 if window is None else max(0, num_tokens - window + 1) // SIZE)

    def drop(self, tables: list[list[Block | None]], num_tokens: int) -> None:
        for group, table in enumerate(tables):
            for index in self.dropped(group, num_tokens):
                table[index] = None

    def check(self, is_last: bool) -> None:
        assert_integrity(
            self.pool,
            [seq.kv for seq in self.seqs],
            lambda: [column for entry in self.cache for column in entry.columns],
        )
        for group, allocator in enumerate(self.pool.allocators):
            assert allocator.num_free == self.num_free(group)
            counts = sorted(block.num_holders for block in self.blocks(group))
            assert sorted(allocator.counts[allocator.counts > 0].tolist()) == counts
        if is_last:
            self.stores.carry_out()
            assert self.num_saved == self.num_saves
        if not self.pool.queue.operations:
            for seq in self.seqs:
                self.stores.assert_holds(seq)

    def run(self, steps: list[Step]) -> None:
        for operation, a, b in steps:
            if operation == "admit":
                self.admit(a, b)
            elif operation in ("evict", "narrow"):
                getattr(self, operation)(a)
            elif self.seqs:
                getattr(self, operation)(self.seqs[a % len(self.seqs)], b)
            self.check(is_last=False)
        self.check(is_last=True)
        while self.seqs:
            self.abort(self.seqs[-1], 0)
        while self.cache:
            self.evict(0)
        assert self.pool.num_free_blocks == self.pool.num_blocks == sum(self.num_blocks)
        assert_integrity(self.pool, ())

    def admit(self, a: int, b: int) -> None:
        """Start a sequence, with blocks of the cache or without."""
        seq = self.new()
        entry = self.cache[a % len(self.cache)] if self.cache and b % 3 else None
        count = b % (len(entry.columns) + 1) if entry else 0
        while entry and any(
            blocks[index] is None
            for group, blocks in enumerate(entry.blocks)
            for index in {*range(count)} - {*self.dropped(group, count * SIZE)}
        ):
            count -= 1  # the cache has given back blocks of a window
        self.pool.adopt(seq.kv, entry.columns[:count] if entry else [])
        assert seq.kv.num_computed_tokens == count * SIZE and seq.kv.num_sealed_blocks == count
        seq.token_ids = entry.token_ids[: count * SIZE] if entry else []
        self.model[seq.id] = [list(blocks[:count]) for blocks in entry.blocks] if entry else [[] for _ in self.groups]
        self.drop(self.model[seq.id], count * SIZE)
        self.hold(self.model[seq.id], 1)

    def new(self) -> Sequence:
        self.count += 1
        self.seqs.append(make_seq(self.count, []))
        return self.seqs[-1]

    def hold(self, tables: Any, change: int) -> None:
        for table in tables:
            for block in table:
                if block is not None:
                    block.num_holders += change

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        tables, first = self.model[seq.id], seq.kv.num_computed_tokens // SIZE
        ends, shared = [], []
        for group, table in enumerate(tables):
            visible = 8 + SINKS.window if self.groups[group] is SINKING else self.groups[group].window
            limit = visible and -(-(visible + STEP) // SIZE) + 2
            ends.append(min(-(-num_tokens // SIZE), table.count(None) + limit if limit else num_tokens))
            shared.append([i for i in range(first, len(table)) if cast(Block, table[i]).num_holders > 1])
        missing = [
            len(indices) + max(0, end - len(table)) for table, indices, end in zip(tables, shared, ends, strict=True)
        ]
        fits = all(count <= self.num_free(group) for group, count in enumerate(missing))
        assert self.pool.num_missing(seq.kv, num_tokens) == missing
        assert self.pool.reserve(seq.kv, num_tokens) is fits
        if fits:
            for table, indices, end in zip(tables, shared, ends, strict=True):
                for index in indices:
                    cast(Block, table[index]).num_holders -= 1
                    table[index] = Block()
                table += [Block() for _ in range(len(table), end)]
        return fits

    def extend(self, seq: Sequence, b: int) -> None:
        """Compute up to nine tokens: known tokens, then new tokens."""
        start, stop = seq.kv.num_computed_tokens, seq.kv.num_computed_tokens + 1 + b % 9
        if not self.reserve(seq, stop):
            return
        seq.token_ids += [1000 * seq.id + index for index in range(len(seq.token_ids), stop)]
        self.stores.write(seq, start, seq.token_ids[start:stop])
        seq.kv.num_computed_tokens = stop
        self.pool.drop(seq.kv, stop // SIZE * SIZE)
        for group, table in enumerate(self.model[seq.id]):
            for index in self.dropped(group, stop // SIZE * SIZE):
                self.hold([[table[index]]], -1)
                table[index] = None
            limit = self.pool.max_blocks[group]
            assert limit is None or len(table) - table.count(None) <= limit

    def draft(self, seq: Sequence, b: int) -> None:
        """Write draft tokens, and reject all of them."""
        start = seq.kv.num_computed_tokens
        if self.reserve(seq, start + 1 + b % 12):
            self.stores.write(seq, start, [-2] * (1 + b % 12))
            self.roll_back(seq, b)

    def tree(self, seq: Sequence, b: int) -> None:
        """Write a draft tree, accept every second node, move their KV to its place, and give back the blocks behind."""
        start, count = seq.kv.num_computed_tokens, 2 + b % 10
        if not self.reserve(seq, start + count):
            return
        seq.token_ids = seq.token_ids[:start]
        nodes = [1000 * seq.id + 500 + index for index in range(count)]
        self.stores.write(seq, start, nodes)
        accepted = range(0, count, 2)
        for group in range(len(self.groups)):
            slots = self.pool.slots(seq.kv, group, start, start + count)
            self.pool.queue.append(Copy(group, [slots[i] for i in accepted], slots[: len(accepted)]))
        seq.token_ids += [nodes[index] for index in accepted]
        seq.kv.num_computed_tokens = start + len(accepted)
        self.roll_back(seq, b)

    def save(self, seq: Sequence, b: int) -> None:
        """Save the last computed tokens. They must arrive as they are now."""
        stop = seq.kv.num_computed_tokens
        if not stop:
            return
        tokens = seq.token_ids[max(0, stop - 1 - b % 5) : stop]
        slots = [self.pool.slots(seq.kv, group, stop - len(tokens), stop) for group in range(len(self.groups))]

        def sink(saved: Any) -> None:
            self.num_saved += saved == [tokens] * len(self.groups)

        self.num_saves += 1
        self.pool.queue.save(slots, sink)

    def roll_back(self, seq: Sequence, b: int) -> None:
        self.pool.roll_back(seq.kv, seq.kv.num_computed_tokens)
        for table in self.model[seq.id]:
            while len(table) > -(-seq.kv.num_computed_tokens // SIZE):
                cast(Block, table.pop()).num_holders -= 1

    def fork(self, seq: Sequence, b: int) -> None:
        child = self.new()
        self.pool.fork(seq.kv, child.kv)
        assert child.kv.num_computed_tokens == seq.kv.num_computed_tokens
        child.token_ids = seq.token_ids[: seq.kv.num_computed_tokens]
        count = -(-seq.kv.num_computed_tokens // SIZE)
        self.model[child.id] = [table[:count] for table in self.model[seq.id]]
        self.drop(self.model[child.id], seq.kv.num_computed_tokens // SIZE * SIZE)
        self.hold(self.model[child.id], 1)

    def preempt(self, seq: Sequence, b: int) -> None:
        self.pool.release(seq.kv)
        assert seq.kv.num_computed_tokens == 0
        self.hold(self.model[seq.id], -1)
        self.model[seq.id] = [[] for _ in self.groups]

    def abort(self, seq: Sequence, b: int) -> None:
        self.preempt(seq, b)
        self.seqs.remove(seq)
        del self.model[seq.id]

    def keep(self, seq: Sequence, b: int) -> None:
        """Put the first blocks into the cache, unless a block is dropped."""
        count = min(1 + b % 5, seq.kv.num_computed_tokens // SIZE)
        columns = [seq.kv.column(index) for index in range(count)]
        if not columns or any(DROPPED in column for column in columns):
            return
        for column in columns:
            self.pool.lock(column)
        blocks = [table[:count] for table in self.model[seq.id]]
        self.hold(blocks, 1)
        self.cache.append(Cached(columns, blocks, seq.token_ids[: count * SIZE]))

    def evict(self, a: int) -> None:
        """Give back an entry of the cache."""
        if self.cache:
            entry = self.cache.pop(a % len(self.cache))
            for index, column in enumerate(entry.columns):
                is_idle = all(block is None or block.num_holders == 1 for block in (b[index] for b in entry.blocks))
                assert self.pool.is_idle(column) is is_idle
                self.pool.unlock(column)
            self.hold(entry.blocks, -1)

    def narrow(self, a: int) -> None:
        """Give back the first block of an entry of the cache that one limited group has."""
        if not self.cache or self.groups[-1] is FULL:
            return
        entry, group = self.cache[a % len(self.cache)], len(self.groups) - 1
        index = next((index for index, column in enumerate(entry.columns) if column[group] != DROPPED), None)
        if index is not None:
            column = entry.columns[index]
            self.pool.unlock((*[DROPPED] * group, column[group]))
            entry.columns[index] = (*column[:group], DROPPED)
            self.hold([[entry.blocks[group][index]]], -1)
            entry.blocks[group][index] = None


POOL_OPERATIONS = [
    "admit",
    "extend",
    "extend",
    "extend",
    "draft",
    "tree",
    "save",
    "save",
    "roll_back",
    "fork",
    "preempt",
    "abort",
    "keep",
    "evict",
    "narrow",
]
counts = st.lists(st.integers(1, 16), min_size=2, max_size=2)
pools = st.tuples(st.sampled_from(GROUPS), counts, steps_of(POOL_OPERATIONS, 24))


@example_counts(10_000)
def test_the_pool_agrees_with_a_plain_model(examples: int) -> None:
    def check(example: tuple[tuple[KVGroup, ...], list[int], list[Step]]) -> None:
        groups, num_blocks, steps = example
        PoolWorld(groups, num_blocks[: len(groups)]).run(steps)

    run_examples(examples, pools, check)


@pytest.mark.parametrize("groups", GROUPS)
def test_saved_blocks_may_be_reused_before_the_next_forward(groups: tuple[KVGroup, ...]) -> None:
    """The only block of a saved sequence is freed. The copy of a fork is written into it, or the tokens of a draft."""
    for is_copied in (True, False):
        world = PoolWorld(groups, [2] * len(groups))
        world.admit(0, 0)
        world.extend(world.seqs[0], 3)
        world.admit(0, 0)
        saved, other = world.seqs
        world.extend(other, 1)
        freed = saved.kv.column(0)
        world.save(saved, 3)
        world.abort(saved, 0)
        if is_copied:
            world.fork(other, 0)
            assert world.reserve(other, 3) and other.kv.column(0) == freed
        else:
            assert world.reserve(other, 8) and other.kv.column(1) == freed
        assert world.num_saved == 0
        world.draft(other, 5)
        world.check(is_last=True)


# ---- the scheduler


def next_token(context: list[int], sample: int) -> int:
    return hash((sample, *context)) % 3


class SchedulerWorld:
    """Requests, a cache of prefixes, and a language model whose next token depends on its whole context."""

    def __init__(self, groups: tuple[KVGroup, ...], num_blocks: int, budget: int) -> None:
        """Windowed groups get the blocks of one sequence, and one for a fork; long prompts take them step by step."""
        self.is_bounded = len(groups) > 1 and num_blocks % 2 == 0
        steps = budget if self.is_bounded else 1000
        seen = visibilities_of(groups)
        self.pool = Pool(groups, [num_blocks] * len(groups), SIZE, "fingerprint", seen, max_step_tokens=steps)
        if self.is_bounded:
            limits = [limit and min(num_blocks, limit + 1 + num_blocks % 4) for limit in self.pool.max_blocks]
            counts = [limit or num_blocks for limit in limits]
            self.pool = Pool(groups, counts, SIZE, "fingerprint", seen, max_step_tokens=steps)
        self.stores = Stores(self.pool)
        self.scheduler = Scheduler(self.pool, budget, 6, self.match, self.reclaim, Pacing(budget))
        self.cache: dict[tuple[int, ...], Column] = {}  # a block, by all tokens up to its end
        self.count = 0
        self.num_finished = self.num_preempted = self.num_cached = self.num_forked = 0

    def match(self, seq: Sequence) -> PrefixMatch:
        match = PrefixMatch()
        while (len(match.blocks) + 1) * SIZE < seq.num_tokens:
            column = self.cache.get(tuple(seq.token_ids[: (len(match.blocks) + 1) * SIZE]))
            if column is None:
                break
            match.blocks.append(column)
        while any(match.blocks[index][group] == DROPPED for group, index in self.needed(match)):
            match.blocks.pop()
        start = len(match.blocks) * SIZE
        for key, column in self.cache.items():
            same = [a == b for a, b in zip(key[start:], seq.token_ids[start:-1], strict=False)]
            count = same.index(False) if False in same else len(same)
            if (
                len(key) == start + SIZE
                and key[:start] == tuple(seq.token_ids[:start])
                and count
                and DROPPED not in column
            ):
                match.tail = (column, count)
        return match

    def needed(self, match: PrefixMatch) -> list[tuple[int, int]]:
        """The group and the index of every block that the token behind a match sees."""
        count, needed = len(match.blocks), []
        for group in range(len(self.pool.groups)):
            first = self.pool.first_seen(group, count * SIZE) // SIZE
            sinks = range(min(first, self.pool.num_sink_blocks[group]))
            needed += [(group, index) for index in (*sinks, *range(first, count))]
        return needed

    def reclaim(self, num_blocks: Any) -> None:
        """Give back the blocks of a windowed group alone, and whole columns if other groups lack blocks."""
        for group, count in enumerate(num_blocks):
            for key, column in list(self.cache.items()):
                part = tuple(block if index == group else DROPPED for index, block in enumerate(column))
                if count <= 0 or column[group] == DROPPED or not self.pool.is_idle(part):
                    continue
                count -= 1
                if self.is_bounded and self.pool.max_blocks[group]:
                    self.pool.unlock(part)
                    self.cache[key] = tuple(DROPPED if index == group else block for index, block in enumerate(column))
                elif self.pool.is_idle(column):
                    self.pool.unlock(self.cache.pop(key))

    def submit(self, a: int, b: int) -> None:
        """Submit a prompt of zeros and ones: many prompts begin alike. A quarter of the requests have several samples."""
        token_ids = [(a >> index % 3) % 2 for index in range(1 + b % 23)]
        ids = [self.count + index for index in range(1 + (a % 4 == 3) * (1 + b % 3))]
        self.count += len(ids)
        seq, *seq.forks = [make_seq(number, list(token_ids), tuple(ids)) for number in ids]
        self.scheduler.add(seq)

    def abort(self, a: int, b: int) -> None:
        seqs = self.scheduler.seqs
        if seqs:
            self.scheduler.remove(seqs[a % len(seqs)])

    def step(self, a: int = 1, b: int = 0) -> None:
        scheduled = self.scheduler.schedule()
        for seq in [seq for seq in self.scheduler.waiting if seq.error]:
            assert seq.forks or not self.is_bounded, "a prompt without other samples fits"
            self.scheduler.remove(seq)
        decoding = sum(seq.is_decoding for seq in scheduled)
        assert sum(seq.num_scheduled_tokens for seq in scheduled) <= max(self.scheduler.max_step_tokens, decoding)
        self.stores.carry_out()
        for seq in scheduled:
            start, stop = seq.kv.num_computed_tokens, seq.kv.num_computed_tokens + seq.num_scheduled_tokens
            assert start < stop <= seq.num_tokens - bool(seq.forks)
            self.stores.write(seq, start, seq.token_ids[start:stop])
        for seq in scheduled:
            seq.kv.num_computed_tokens += seq.num_scheduled_tokens
            seq.num_scheduled_tokens = 0
            self.stores.assert_holds(seq)
            if seq.num_uncomputed_tokens == 0:
                seq.token_ids.append(next_token(seq.token_ids, seq.sample))
                self.pool.roll_back(seq.kv, seq.kv.num_computed_tokens)
            if a % 2:
                self.keep(seq)
            self.pool.drop(seq.kv, seq.kv.num_computed_tokens // SIZE * SIZE)
            if seq.num_completion_tokens >= 7:
                self.finish(seq)
        assert_integrity(self.pool, [seq.kv for seq in self.scheduler.seqs], lambda: list(self.cache.values()))

    def keep(self, seq: Sequence) -> None:
        while (seq.kv.num_sealed_blocks + 1) * SIZE <= seq.kv.num_computed_tokens:
            column = seq.kv.column(seq.kv.num_sealed_blocks)
            seq.kv.num_sealed_blocks += 1
            key = tuple(seq.token_ids[: seq.kv.num_sealed_blocks * SIZE])
            if key not in self.cache and column[0] != DROPPED:
                self.pool.lock(column)
                self.cache[key] = column

    def finish(self, seq: Sequence) -> None:
        expected = seq.token_ids[: seq.request.num_prompt_tokens]
        while len(expected) < seq.num_tokens:
            expected.append(next_token(expected, seq.sample))
        assert seq.token_ids == expected
        self.num_finished += 1
        self.num_preempted += seq.num_preemptions > 0
        self.num_cached += seq.kv.num_cached_tokens > 0
        self.num_forked += seq.sample > 0
        self.scheduler.remove(seq)

    def run(self, steps: list[Step]) -> None:
        for operation, a, b in steps:
            getattr(self, operation)(a, b)
        for _ in range(3000):
            if not self.scheduler.seqs:
                break
            self.step()
        assert not self.scheduler.seqs, "every request ends"
        while self.cache:
            self.pool.unlock(self.cache.popitem()[1])
        assert self.pool.num_free_blocks == self.pool.num_blocks


worlds = st.tuples(
    st.sampled_from(GROUPS),
    st.integers(8, 24),
    st.sampled_from([1, 3, 8, 64]),
    steps_of(["submit", "submit", "submit", "step", "step", "abort"], 16),
)


@example_counts(2_000)
def test_every_request_gets_its_own_tokens_whatever_happens(examples: int) -> None:
    totals = dict.fromkeys(("num_finished", "num_preempted", "num_cached", "num_forked"), 0)

    def check(example: tuple[tuple[KVGroup, ...], int, int, list[Step]]) -> None:
        groups, num_blocks, budget, steps = example
        world = SchedulerWorld(groups, num_blocks, budget)
        world.run(steps)
        for name in totals:
            totals[name] += getattr(world, name)

    run_examples(examples, worlds, check)
    assert all(count >= examples // 20 for count in totals.values()), totals
