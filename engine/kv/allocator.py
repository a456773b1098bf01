"""The blocks of one KV group, with counts of their references. A free block has no reference. Adjacent blocks are preferred."""

from __future__ import annotations

import numpy as np


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
