"""Blocks: ownership, adjacency, sharing, copy on write, dropping behind windows. Random operations: test_kv_properties."""

from __future__ import annotations

import pytest

from pitlane import Copy, KVState
from pitlane.engine.kv.allocator import MIN_REUSED, BlockAllocator
from pitlane.engine.kv.pool import DROPPED, Pool
from pitlane.engine.kv.state import KVGroup
from tests.integrity import assert_integrity

SIZE = 4
FULL = KVGroup((0, 1), 2, 8)
WINDOWED = KVGroup((2,), 2, 8, window=6)


def make_pool(num_blocks: int = 12, *groups: KVGroup) -> Pool:
    groups = groups or (FULL,)
    return Pool(groups, [num_blocks] * len(groups), SIZE, "fingerprint", max_step_tokens=1000)


def num_free(pool: Pool) -> list[int]:
    return [allocator.num_free for allocator in pool.allocators]


# ---- the allocator


def test_blocks_taken_at_once_are_adjacent() -> None:
    allocator = BlockAllocator(10)
    assert allocator.take(4, None) == [0, 1, 2, 3]
    assert allocator.num_free == 6


def test_a_table_grows_right_behind_its_last_block() -> None:
    allocator = BlockAllocator(20)
    first = allocator.take(3, None)
    second = allocator.take(3, None)
    assert second[0] > first[-1] + 1, "the first table has room to grow"
    assert allocator.take(2, first[-1]) == [first[-1] + 1, first[-1] + 2]
    assert allocator.take(2, second[-1]) == [second[-1] + 1, second[-1] + 2]


def test_behind_an_occupied_block_blocks_come_from_the_largest_free_run() -> None:
    allocator = BlockAllocator(12)
    allocator.take(12, None)
    for block in (1, 5, 6, 7, 8, 10):
        allocator.release(block)
    assert allocator.take(2, 2) == [7, 8]  # the middle of [5, 9): the table that ends with block 4 may grow
    assert sorted(allocator.take(4, None)) == [1, 5, 6, 10]
    assert allocator.num_free == 0


def test_a_text_without_end_walks_in_a_ring_of_used_blocks() -> None:
    """A sequence holds 3 blocks. It takes new blocks until enough old blocks are adjacent and free, then only used blocks."""
    allocator = BlockAllocator(100)
    table = allocator.take(3, None)
    for _ in range(200):
        table += allocator.take(1, table[-1], prefers_used=True)
        allocator.release(table.pop(0))
    assert allocator.used.sum() == 3 + MIN_REUSED
    others = allocator.take(4, table[-1])
    assert len(set(others + table)) == 7 and allocator.num_free == 93
    assert allocator.take(90, None, prefers_used=True) and allocator.num_free == 3, (
        "without a long run, new blocks are taken"
    )


def test_several_texts_without_end_share_a_few_used_blocks() -> None:
    allocator = BlockAllocator(1000)
    tables = [allocator.take(3, None) for _ in range(4)]
    for step in range(2000):
        table = tables[step * 7 % 4]
        table += allocator.take(1 + step % 2, table[-1], prefers_used=True)
        while len(table) > 3:
            allocator.release(table.pop(0))
    assert allocator.used.sum() <= 4 * (3 + 2 * MIN_REUSED)
    assert len({block for table in tables for block in table}) == 12 == 1000 - allocator.num_free


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


def test_a_dropped_block_can_be_neither_shared_nor_released() -> None:
    allocator = BlockAllocator(2)
    allocator.take(2, None)
    for call in (allocator.release, allocator.share):
        with pytest.raises(AssertionError):
            call(DROPPED)
    assert allocator.counts.tolist() == [1, 1]


# ---- the pool


def test_reserve_is_all_or_nothing() -> None:
    pool, first, second = make_pool(5, FULL, WINDOWED), KVState(), KVState()
    assert pool.reserve(first, 3 * SIZE)
    assert [len(table) for table in first.block_tables] == [3, 3]
    assert not pool.reserve(second, 2 * SIZE + 1)
    assert second.block_tables == [] and num_free(pool) == [2, 2]
    assert not pool.reserve(first, 5 * SIZE + 1)
    assert [len(table) for table in first.block_tables] == [3, 3]
    assert pool.reserve(second, 2 * SIZE) and num_free(pool) == [0, 0]
    assert pool.reserve(first, 3 * SIZE), "the blocks are reserved already"
    assert_integrity(pool, [first, second])


@pytest.mark.parametrize("num_tokens, blocks", [(0, 0), (1, 1), (SIZE, 1), (SIZE + 1, 2), (3 * SIZE, 3)])
def test_missing_blocks_are_rounded_up(num_tokens: int, blocks: int) -> None:
    pool, kv = make_pool(), KVState()
    assert pool.num_missing(kv, num_tokens) == [blocks]
    pool.reserve(kv, SIZE)
    assert pool.num_missing(kv, num_tokens) == [max(0, blocks - 1)]


def test_an_adopted_prefix_is_shared_until_both_sequences_release_it() -> None:
    pool, owner, guest = make_pool(8, FULL, WINDOWED), KVState(), KVState()
    pool.reserve(owner, 3 * SIZE)
    prefix = [owner.column(0), owner.column(1)]
    pool.adopt(guest, prefix)
    assert (guest.num_computed_tokens, guest.num_sealed_blocks) == (2 * SIZE, 2)
    assert guest.block_tables == [table[:2] for table in owner.block_tables]
    pool.reserve(guest, 3 * SIZE)
    assert guest.column(2) != owner.column(2) and num_free(pool) == [8 - 4] * 2
    assert_integrity(pool, [owner, guest])
    pool.release(owner)
    assert num_free(pool) == [8 - 3] * 2 and owner.block_tables == []
    assert_integrity(pool, [guest])
    pool.release(guest)
    assert num_free(pool) == [8, 8] and (guest.num_computed_tokens, guest.num_sealed_blocks) == (0, 0)
    with pytest.raises(AssertionError, match="only an empty sequence"):
        pool.reserve(guest, 1)
        pool.adopt(guest, prefix)


@pytest.mark.parametrize("num_tokens, kept", [(12, 3), (11, 3), (9, 3), (8, 2), (1, 1), (0, 0)])
def test_roll_back_keeps_the_block_of_the_last_token(num_tokens: int, kept: int) -> None:
    pool, kv = make_pool(8, FULL, WINDOWED), KVState()
    pool.reserve(kv, 3 * SIZE)
    before = [list(table) for table in kv.block_tables]
    pool.roll_back(kv, num_tokens)
    assert kv.block_tables == [table[:kept] for table in before]
    assert num_free(pool) == [8 - kept] * 2
    assert_integrity(pool, [kv])


def test_roll_back_leaves_shared_blocks_to_their_other_holders() -> None:
    pool, owner, guest = make_pool(), KVState(), KVState()
    pool.reserve(owner, 2 * SIZE)
    pool.adopt(guest, [owner.column(0), owner.column(1)])
    pool.roll_back(guest, SIZE)
    assert_integrity(pool, [owner, guest])
    assert len(owner.block_tables[0]) == 2 and pool.num_free_blocks == 10


def test_drop_frees_only_blocks_that_no_later_token_sees() -> None:
    """Window 6: token p sees [p - 5, p]. After n computed tokens the next token is n."""
    for num_computed in range(1, 25):
        pool, kv = make_pool(8, FULL, WINDOWED), KVState()
        pool.reserve(kv, 24)
        full = list(kv.block_tables[0])
        for count in range(1, num_computed + 1):
            pool.drop(kv, count)
        first_seen = max(0, num_computed - 5)
        dropped = [block == DROPPED for block in kv.block_tables[1]]
        assert dropped == [(index + 1) * SIZE <= first_seen for index in range(6)]
        assert kv.block_tables[0] == full, "the group without a window keeps all blocks"
        assert_integrity(pool, [kv])
        pool.slots(kv, 1, first_seen, 24)  # no visible block is dropped
        pool.release(kv)
        assert_integrity(pool, [])


def test_drop_at_once_equals_drop_step_by_step() -> None:
    pool, first, second = make_pool(16, WINDOWED), KVState(), KVState()
    for kv in (first, second):
        pool.reserve(kv, 24)
    for count in range(24):
        pool.drop(first, count)
    pool.drop(second, 23)
    assert [b == DROPPED for b in first.block_tables[0]] == [b == DROPPED for b in second.block_tables[0]]
    assert first.block_tables[0].count(DROPPED) == 4


def test_a_dropped_block_stays_locked() -> None:
    pool, kv = make_pool(8, FULL, WINDOWED), KVState()
    pool.reserve(kv, 16)
    column = kv.column(0)
    pool.lock(column)
    assert not pool.is_idle(column)
    pool.drop(kv, 16)
    assert kv.column(0) == (column[0], DROPPED)
    assert_integrity(pool, [kv], lambda: [column])
    pool.release(kv)
    assert pool.is_idle(column)
    pool.lock((column[0], DROPPED))  # a column may hold dropped blocks
    assert not pool.is_idle(column)
    pool.unlock((column[0], DROPPED))
    pool.unlock(column)
    assert_integrity(pool, [])


def test_reaching_into_a_dropped_block_is_refused() -> None:
    pool, kv = make_pool(8, WINDOWED), KVState()
    pool.reserve(kv, 16)
    pool.drop(kv, 16)
    with pytest.raises(AssertionError, match="dropped block"):
        pool.slots(kv, 0, 5, 16)


def test_slots_follow_the_table() -> None:
    pool, kv = make_pool(10), KVState()
    kv.block_tables = [[5, 6, 2, 3, 4, 9]]
    expected = [kv.block_tables[0][token // SIZE] * SIZE + token % SIZE for token in range(6 * SIZE)]
    for start in range(24):
        for stop in range(start, 25):
            assert pool.slots(kv, 0, start, stop) == expected[start:stop]


@pytest.mark.parametrize(
    "harm", ["lost reference", "lost block", "wrong free count", "forgotten lock", "foreign block"]
)
def test_assert_integrity_finds_every_leak(harm: str) -> None:
    pool, kv = make_pool(8, FULL, WINDOWED), KVState()
    pool.reserve(kv, 3 * SIZE)
    assert_integrity(pool, [kv])
    if harm == "lost reference":
        pool.allocators[0].share(kv.block_tables[0][1])
    elif harm == "lost block":
        kv.block_tables[1].pop()
    elif harm == "wrong free count":
        pool.allocators[1].num_free += 1
    elif harm == "forgotten lock":
        pool.lock(kv.column(0))
        assert_integrity(pool, [kv], lambda: [kv.column(0)])
        pool.unlock(kv.column(0))
        with pytest.raises(AssertionError, match="group 0: counts differ from what plugins hold"):
            assert_integrity(pool, [kv], lambda: [kv.column(0)])
        with pytest.raises(AssertionError, match="is not locked"):
            pool.unlock(kv.column(0))
        return
    else:
        kv.block_tables[0][0] = 7
    with pytest.raises(AssertionError, match=r"group [01]: (counts differ|free count is off)"):
        assert_integrity(pool, [kv])


@pytest.mark.parametrize("group", [0, 1])
def test_a_block_is_lost_if_it_is_neither_locked_nor_withheld(group: int) -> None:
    pool, kv = make_pool(8, FULL, WINDOWED), KVState()
    pool.withhold(2)
    assert pool.withheld == [2, 0]
    pool.reserve(kv, SIZE)
    column = kv.column(0)
    pool.lock(column)
    pool.release(kv)
    assert pool.groups_with_lost_blocks == []
    pool.allocators[group].take(1, None)
    assert pool.groups_with_lost_blocks == [group]


# ---- fork and copy on write


def test_a_fork_shares_every_block_until_a_sequence_writes() -> None:
    pool, kv, child = make_pool(8, FULL, WINDOWED), KVState(), KVState()
    pool.reserve(kv, 3 * SIZE)
    kv.num_computed_tokens, kv.num_cached_tokens, kv.num_sealed_blocks = 2 * SIZE + 1, SIZE, 2
    pool.fork(kv, child)
    assert (child.num_computed_tokens, child.num_cached_tokens, child.num_sealed_blocks) == (2 * SIZE + 1, SIZE, 2)
    assert child.block_tables == kv.block_tables and num_free(pool) == [5, 5]
    shared = kv.column(2)
    assert pool.num_missing(child, 2 * SIZE + 2) == [1, 1], "the last block is shared and will be written"
    assert pool.reserve(child, 2 * SIZE + 2)
    assert child.column(2) != shared and kv.column(2) == shared and num_free(pool) == [4, 4]
    assert [table[:2] for table in child.block_tables] == [table[:2] for table in kv.block_tables]
    copies = [operation for operation in pool.queue.operations if isinstance(operation, Copy)]
    assert [(copy.group, copy.sources) for copy in copies] == [(g, [shared[g] * SIZE]) for g in (0, 1)]
    assert [copy.targets for copy in copies] == [pool.slots(child, g, 2 * SIZE, 2 * SIZE + 1) for g in (0, 1)]
    assert pool.reserve(kv, 2 * SIZE + 2) and len(pool.queue.operations) == 2, "the last holder writes without a copy"
    assert_integrity(pool, [kv, child])


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    pool, kv, child = make_pool(), KVState(), KVState()
    pool.reserve(kv, 2 * SIZE)
    kv.num_computed_tokens = 2 * SIZE
    pool.fork(kv, child)
    assert pool.reserve(child, 3 * SIZE) and pool.reserve(kv, 3 * SIZE)
    assert not pool.queue.operations and child.column(2) != kv.column(2)
    assert_integrity(pool, [kv, child])


def test_a_copy_needs_a_free_block() -> None:
    pool, kv, child = make_pool(1), KVState(), KVState()
    pool.reserve(kv, 2)
    kv.num_computed_tokens = 2
    pool.fork(kv, child)
    assert not pool.reserve(child, 3) and not pool.queue.operations and child.block_tables == kv.block_tables
    pool.release(kv)
    assert pool.reserve(child, 3) and not pool.queue.operations
