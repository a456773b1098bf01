"""Blocks: who owns which, adjacency, sharing, dropping behind windows; random operations against a plain model."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any, cast

import pytest

from pitlane import SamplingParams, Sequence
from pitlane.engine.pool import DROPPED, BlockAllocator, Pool
from pitlane.engine.types import Column, KVGroup, Timing

SIZE = 4
FULL = KVGroup((0, 1), 2, 8)
WINDOWED = KVGroup((2,), 2, 8, window=6)


def make_pool(num_blocks: int = 12, *groups: KVGroup) -> Pool:
    return Pool(groups or (FULL,), num_blocks, SIZE, "fingerprint")


def make_seq(number: int = 0) -> Sequence:
    return Sequence(
        id=number,
        token_ids=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        seed=0,
        plan=cast(Any, None),
        detokenizer=cast(Any, None),
        timing=Timing(0.0),
        stop_token_ids=frozenset(),
    )


# ---- the allocator


def test_blocks_taken_at_once_are_adjacent() -> None:
    allocator = BlockAllocator(10)
    assert allocator.take(4, None) == [0, 1, 2, 3]
    assert allocator.num_free == 6


def test_a_table_grows_right_behind_its_last_block() -> None:
    allocator = BlockAllocator(20)
    first = allocator.take(3, None)
    second = allocator.take(3, None)
    assert second[0] > first[-1] + 1, "the second leaves the first room to grow"
    assert allocator.take(2, first[-1]) == [first[-1] + 1, first[-1] + 2]
    assert allocator.take(2, second[-1]) == [second[-1] + 1, second[-1] + 2]


def test_what_is_taken_behind_an_occupied_block_comes_from_the_largest_run() -> None:
    allocator = BlockAllocator(12)
    allocator.take(12, None)
    for block in (1, 5, 6, 7, 8, 10):
        allocator.release(block)
    assert allocator.take(2, 2) == [7, 8]  # the middle of [5, 9): whoever holds 4 may grow
    assert sorted(allocator.take(4, None)) == [1, 5, 6, 10]
    assert allocator.num_free == 0


def test_every_block_can_be_taken_one_by_one() -> None:
    allocator = BlockAllocator(31)
    assert sorted(block for _ in range(31) for block in allocator.take(1, None)) == list(range(31))


def test_a_shared_block_is_free_after_its_last_release() -> None:
    allocator = BlockAllocator(2)
    (block,) = allocator.take(1, None)
    allocator.share(block)
    allocator.release(block)
    assert allocator.num_free == 1
    allocator.release(block)
    assert allocator.num_free == 2
    with pytest.raises(AssertionError, match=f"block {block} is released twice"):
        allocator.release(block)
    with pytest.raises(AssertionError, match=f"block {block} is free"):
        allocator.share(block)
    with pytest.raises(AssertionError, match="asked for 3 blocks, 2 are free"):
        allocator.take(3, None)


def test_a_dropped_block_is_nobodys() -> None:
    allocator = BlockAllocator(2)
    allocator.take(2, None)
    for verb in (allocator.release, allocator.share):
        with pytest.raises(AssertionError):
            verb(DROPPED)
    assert allocator.counts.tolist() == [1, 1]


# ---- the pool


def test_reserve_is_all_or_nothing() -> None:
    pool, one, two = make_pool(5, FULL, WINDOWED), make_seq(1), make_seq(2)
    assert pool.reserve(one, 3 * SIZE)
    assert [len(table) for table in one.block_tables] == [3, 3]
    assert not pool.reserve(two, 2 * SIZE + 1)
    assert two.block_tables == [] and pool.num_free_blocks == 2
    assert not pool.reserve(one, 5 * SIZE + 1)
    assert [len(table) for table in one.block_tables] == [3, 3]
    assert pool.reserve(two, 2 * SIZE) and pool.num_free_blocks == 0
    assert pool.reserve(one, 3 * SIZE), "nothing more is needed"
    pool.check_integrity([one, two])


@pytest.mark.parametrize("num_tokens, blocks", [(0, 0), (1, 1), (SIZE, 1), (SIZE + 1, 2), (3 * SIZE, 3)])
def test_missing_blocks_are_rounded_up(num_tokens: int, blocks: int) -> None:
    pool, seq = make_pool(), make_seq()
    assert pool.num_missing_blocks(seq, num_tokens) == blocks
    pool.reserve(seq, SIZE)
    assert pool.num_missing_blocks(seq, num_tokens) == max(0, blocks - 1)


def test_an_adopted_prefix_is_shared_until_both_let_go() -> None:
    pool, owner, guest = make_pool(8, FULL, WINDOWED), make_seq(1), make_seq(2)
    pool.reserve(owner, 3 * SIZE)
    prefix = [owner.column(0), owner.column(1)]
    pool.adopt(guest, prefix)
    assert guest.block_tables == [table[:2] for table in owner.block_tables]
    pool.reserve(guest, 3 * SIZE)
    assert guest.column(2) != owner.column(2) and pool.num_free_blocks == 8 - 4
    pool.check_integrity([owner, guest])
    pool.release(owner)
    assert pool.num_free_blocks == 8 - 3 and owner.block_tables == []
    pool.check_integrity([guest])
    pool.release(guest)
    assert pool.num_free_blocks == 8
    with pytest.raises(AssertionError, match="only an empty sequence"):
        pool.reserve(guest, 1)
        pool.adopt(guest, prefix)


@pytest.mark.parametrize("num_tokens, kept", [(12, 3), (11, 3), (9, 3), (8, 2), (1, 1), (0, 0)])
def test_roll_back_keeps_the_block_of_the_last_token(num_tokens: int, kept: int) -> None:
    pool, seq = make_pool(8, FULL, WINDOWED), make_seq()
    pool.reserve(seq, 3 * SIZE)
    before = [list(table) for table in seq.block_tables]
    pool.roll_back(seq, num_tokens)
    assert seq.block_tables == [table[:kept] for table in before]
    assert pool.num_free_blocks == 8 - kept
    pool.check_integrity([seq])


def test_roll_back_leaves_shared_blocks_to_the_others() -> None:
    pool, owner, guest = make_pool(), make_seq(1), make_seq(2)
    pool.reserve(owner, 2 * SIZE)
    pool.adopt(guest, [owner.column(0), owner.column(1)])
    pool.roll_back(guest, SIZE)
    pool.check_integrity([owner, guest])
    assert len(owner.block_tables[0]) == 2 and pool.num_free_blocks == 10


def test_drop_frees_only_what_no_later_token_sees() -> None:
    """Window 6: token p sees [p - 5, p]. After n computed tokens the next one is n."""
    for num_computed in range(1, 25):
        pool, seq = make_pool(8, FULL, WINDOWED), make_seq()
        pool.reserve(seq, 24)
        full = list(seq.block_tables[0])
        for count in range(1, num_computed + 1):
            pool.drop(seq, count)
        first_seen = max(0, num_computed - 5)
        dropped = [block == DROPPED for block in seq.block_tables[1]]
        assert dropped == [(index + 1) * SIZE <= first_seen for index in range(6)]
        assert seq.block_tables[0] == full, "the group without a window keeps all"
        pool.check_integrity([seq])
        pool.spans(seq, 1, first_seen, 24)  # all that is seen is there
        pool.release(seq)
        pool.check_integrity([])


def test_drop_at_once_equals_drop_step_by_step() -> None:
    pool, one, two = make_pool(16, WINDOWED), make_seq(1), make_seq(2)
    for seq in (one, two):
        pool.reserve(seq, 24)
    for count in range(24):
        pool.drop(one, count)
    pool.drop(two, 23)
    assert [b == DROPPED for b in one.block_tables[0]] == [b == DROPPED for b in two.block_tables[0]]
    assert one.block_tables[0].count(DROPPED) == 4


def test_a_dropped_block_stays_with_who_locked_it() -> None:
    pool, seq = make_pool(8, FULL, WINDOWED), make_seq()
    pool.reserve(seq, 16)
    column = seq.column(0)
    pool.lock(column)
    assert not pool.is_idle(column)
    pool.drop(seq, 16)
    assert seq.column(0) == (column[0], DROPPED)
    pool.check_integrity([seq], lambda: [column])
    pool.release(seq)
    assert pool.is_idle(column)
    pool.lock((column[0], DROPPED))  # a column may lack what was dropped
    assert not pool.is_idle(column)
    pool.unlock((column[0], DROPPED))
    pool.unlock(column)
    pool.check_integrity([])


def test_reaching_into_a_dropped_block_is_refused() -> None:
    pool, seq = make_pool(8, WINDOWED), make_seq()
    pool.reserve(seq, 16)
    pool.drop(seq, 16)
    for verb in (pool.spans, pool.slots):
        with pytest.raises(AssertionError, match="dropped block"):
            verb(seq, 0, 5, 16)


def test_spans_and_slots_follow_the_table() -> None:
    pool, seq = make_pool(10), make_seq()
    seq.block_tables = [[5, 6, 2, 3, 4, 9]]
    naive = [seq.block_tables[0][token // SIZE] * SIZE + token % SIZE for token in range(6 * SIZE)]
    for start in range(24):
        for stop in range(start, 25):
            assert pool.slots(seq, 0, start, stop) == naive[start:stop]
            spans = pool.spans(seq, 0, start, stop)
            found = [(slot, span.first + i) for span in spans for i, slot in enumerate(range(span.start, span.stop))]
            assert found == [(naive[token], token) for token in range(start, stop)]
            assert all(span.start < span.stop for span in spans), "torch's attention dies of an empty one"
            assert all(a.stop != b.start for a, b in pairwise(spans)), "runs are as long as can be"
    assert len(pool.spans(seq, 0, 0, 24)) == 3


@pytest.mark.parametrize(
    "harm", ["lost reference", "lost block", "wrong free count", "forgotten lock", "foreign block"]
)
def test_check_integrity_sees_every_leak(harm: str) -> None:
    pool, seq = make_pool(8, FULL, WINDOWED), make_seq()
    pool.reserve(seq, 3 * SIZE)
    pool.check_integrity([seq])
    if harm == "lost reference":
        pool.lock(seq.column(1))
    elif harm == "lost block":
        seq.block_tables[1].pop()
    elif harm == "wrong free count":
        pool.allocators[1].num_free += 1
    elif harm == "forgotten lock":
        pool.lock(seq.column(0))
        pool.check_integrity([seq], lambda: [seq.column(0)])
        pool.unlock(seq.column(0))
        with pytest.raises(AssertionError, match="group 0: counts differ"):
            pool.check_integrity([seq], lambda: [seq.column(0)])
        return
    else:
        seq.block_tables[0][0] = 7
    with pytest.raises(AssertionError, match=r"group [01]: (counts differ|free count is off)"):
        pool.check_integrity([seq])


# ---- random operations against a plain model


class Model:
    """What must be true, said in sets: per group, block -> holders."""

    def __init__(self, num_groups: int, num_blocks: int) -> None:
        self.holders: list[dict[int, list[object]]] = [{b: [] for b in range(num_blocks)} for _ in range(num_groups)]

    def update(self, group: int, before: list[int], after: list[int], holder: object) -> None:
        """A table changed: new blocks were free; gone ones lose this holder."""
        for block in set(after) - set(before) - {DROPPED}:
            assert self.holders[group][block] == [], "a block in use was handed out"
            self.holders[group][block].append(holder)
        for block in set(before) - set(after) - {DROPPED}:
            self.holders[group][block].remove(holder)

    def num_free(self) -> int:
        return min(sum(not held for held in group.values()) for group in self.holders)


@pytest.mark.parametrize("first_seed", range(0, 300, 30))
def test_random_operations_agree_with_a_plain_model(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 30):
        run_random_operations(seed)


def run_random_operations(seed: int) -> None:
    generator = random.Random(seed)
    groups = generator.choice([(FULL,), (WINDOWED,), (FULL, WINDOWED)])
    num_blocks = generator.randint(1, 14)
    pool, model = make_pool(num_blocks, *groups), Model(len(groups), num_blocks)
    seqs: dict[int, tuple[Sequence, int]] = {}  # with tokens computed
    locked: list[Column] = []
    for step in range(40):
        operation = generator.choice(["new", "grow", "grow", "compute", "roll back", "release", "lock", "unlock"])
        number = generator.choice(list(seqs)) if seqs else None
        if operation == "new":
            seq = make_seq(step)
            blocks: list[Column] = []
            if number is not None and generator.random() < 0.6:
                donor, computed = seqs[number]
                blocks = [donor.column(index) for index in range(generator.randint(0, computed // SIZE))]
            pool.adopt(seq, blocks)
            for column in blocks:
                for group, block in enumerate(column):
                    if block != DROPPED:
                        model.holders[group][block].append(step)
            seqs[step] = (seq, len(blocks) * SIZE)
        elif operation == "unlock" and locked:
            column = locked.pop(generator.randrange(len(locked)))
            pool.unlock(column)
            for group, block in enumerate(column):
                if block != DROPPED:
                    model.holders[group][block].remove("lock")
        elif number is not None and operation not in ("new", "unlock"):
            seq, computed = seqs[number]
            before = [list(table) for table in seq.block_tables] or [[] for _ in groups]
            room = len(before[0]) * SIZE
            if operation == "grow":
                wanted = computed + generator.randint(0, 12)
                fits = max(0, -(-wanted // SIZE) - len(before[0])) <= model.num_free()
                assert pool.reserve(seq, wanted) is fits
                if not fits:
                    assert (seq.block_tables or [[] for _ in groups]) == before
            elif operation == "compute" and room > computed:
                computed = generator.randint(computed + 1, room)
                pool.drop(seq, computed)
                seqs[number] = (seq, computed)
            elif operation == "roll back":
                pool.roll_back(seq, computed)
                assert len(seq.block_tables[0]) == -(-computed // SIZE)
            elif operation == "release":
                pool.release(seq)
                del seqs[number]
            elif operation == "lock" and computed >= SIZE:
                column = seq.column(generator.randrange(computed // SIZE))
                pool.lock(column)
                locked.append(column)
                for group, block in enumerate(column):
                    if block != DROPPED:
                        model.holders[group][block].append("lock")
            after = seq.block_tables or [[] for _ in groups]
            for group in range(len(groups)):
                model.update(group, before[group], after[group], number)
        assert pool.num_free_blocks == model.num_free()
        for group, allocator in enumerate(pool.allocators):
            assert allocator.counts.tolist() == [len(held) for held in model.holders[group].values()]
        pool.check_integrity([seq for seq, _ in seqs.values()], lambda: list(locked))
    for seq, _ in seqs.values():
        pool.release(seq)
    for column in locked:
        pool.unlock(column)
    pool.check_integrity([])
    assert pool.num_free_blocks == num_blocks
