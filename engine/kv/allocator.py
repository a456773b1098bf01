"""The blocks of one KV group, with counts of their references. A free block has no reference. Adjacent blocks are preferred.

On a CPU, a block costs no memory before it is written for the first time. So a sequence that gives back its old blocks takes used
blocks first: else a text without end would walk through the whole store, and the process would grow with the text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# The shortest run of used blocks that is preferred to new blocks: shorter runs would scatter the KV.
MIN_REUSED = 8


class BlockAllocator:
    """Reference counts of one group's blocks. locks: the references that plugins hold."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = np.zeros(num_blocks, dtype=np.int32)
        self.locks = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks
        self.used = np.zeros(num_blocks, dtype=np.bool_)  # whether the block was ever taken

    def take(self, count: int, after: int | None, prefers_used: bool = False) -> list[int]:
        """Take `count` free blocks, adjacent if possible. Try the block behind `after` first.

        prefers_used: before any new block, take blocks from the largest free run of used blocks, if it has `MIN_REUSED` blocks.
        """
        assert count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        taken: list[int] = []
        cursor = self._start(count) if after is None else after + 1
        while len(taken) < count:
            if prefers_used and not self._is_free_and_used(cursor):
                cursor = self._used_start(cursor)
            if cursor >= len(self.counts) or self.counts[cursor]:
                cursor = self._start(count - len(taken))
            self.counts[cursor] = 1
            self.used[cursor] = True
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
        start, length = _largest_run(self.counts == 0)
        return start + length // 2 if start > 0 and length // 2 >= count else start

    def _used_start(self, cursor: int) -> int:
        """First block of the largest free run of used blocks; `cursor` if there is no long run."""
        start, length = _largest_run((self.counts == 0) & self.used)
        return start if length >= MIN_REUSED else cursor

    def _is_free_and_used(self, block: int) -> bool:
        return block < len(self.counts) and bool(self.used[block]) and not self.counts[block]


def _largest_run(chosen: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """The largest run of chosen blocks: its first block, and its length."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], chosen, [0]))))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(stops - starts))
    return int(starts[longest]), int(stops[longest] - starts[longest])
