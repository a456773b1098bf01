"""Reference counts of a pool against the sequences and plugins that hold its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from pitlane import KVState, Lane, Pool
from pitlane.engine.kv.state import Column


def assert_integrity(
    pool: Pool, states: Iterable[KVState], locked: Callable[[], Iterable[Column]] | None = None
) -> None:
    """Assert that counts equal the references of `states` plus the locks, and that free counts agree.

    locked: the columns that plugins hold, one entry per lock. If it is None, the locks are not checked.
    """
    states = list(states)
    for index, allocator in enumerate(pool.allocators):
        held = [block for kv in states if kv.block_tables for block in kv.block_tables[index]]
        references = _histogram(held, len(allocator.counts))
        if locked is not None:
            locks = _histogram([column[index] for column in locked()], len(allocator.counts))
            assert (locks == allocator.locks).all(), f"group {index}: counts differ from what plugins hold"
        differing = np.flatnonzero(references + allocator.locks != allocator.counts)
        withheld = (references[differing] == 0) & (allocator.counts[differing] == 1)
        assert len(differing) == withheld.sum() == pool.withheld[index], f"group {index}: counts differ from references"
        assert allocator.num_free == int((allocator.counts == 0).sum()), f"group {index}: free count is off"


def cached_columns(lane: Lane) -> list[Column]:
    """All columns that the prefix cache holds."""
    return [
        entry.column for exact in (True, False) for entry in lane.state["prefix_cache"].index(exact).entries.values()
    ]


def _histogram(blocks: list[int], num_blocks: int) -> np.ndarray:
    """Count how often every block id is in `blocks`, without dropped blocks."""
    return np.bincount([block for block in blocks if block >= 0], minlength=num_blocks)
