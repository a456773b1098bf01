"""How far the blocks of a sequence reach in one KV group: the blocks that it holds, and the blocks that no later token sees.

Follows from the visibility of the group and the length of a text alone. Knows no owner of a block. Block ranges are half-open.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from pitlane.engine.kv.visibility import Visibility, evicts, max_held_tokens, num_sinks_of

DROPPED = -1


@dataclass(frozen=True, slots=True)
class Reach:
    """max_blocks: the most blocks that a sequence holds; None = no limit, and no block is dropped.

    num_sink_blocks: the first blocks, which hold the sinks; they are never dropped. interval: tokens between two evictions; None =
    the group evicts no block by its keys.
    """

    visibility: Visibility
    block_size: int
    max_blocks: int | None
    num_sink_blocks: int
    interval: int | None

    @classmethod
    def of(cls, visibility: Visibility, max_step_tokens: int | None, block_size: int) -> Reach:
        return cls(
            visibility,
            block_size,
            max_blocks_of(max_held_tokens(visibility, block_size), max_step_tokens, block_size),
            -(-num_sinks_of(visibility) // block_size),
            visibility.interval if evicts(visibility) else None,
        )

    def first_seen(self, position: int) -> int:
        """Index of the first token that a position sees; 0 if no block is dropped."""
        return 0 if self.max_blocks is None else int(self.visibility.starts(np.array([position]))[0])

    def gap(self, num_tokens: int) -> range:
        """The blocks between sinks and window that no token behind the full blocks of `num_tokens` tokens sees."""
        first = self.first_seen(num_tokens // self.block_size * self.block_size) // self.block_size
        return range(self.num_sink_blocks, max(first, self.num_sink_blocks))

    def kept(self, num_tokens: int) -> tuple[range, range]:
        """The tokens that a saved prefix of `num_tokens` tokens must hold: those of the sinks, and the last tokens.

        A group keeps whole blocks. If no token between is dropped, the first range is empty.
        """
        gap, size = self.gap(num_tokens), self.block_size
        return range(gap.start * size if gap else 0), range(gap.stop * size if gap else 0, num_tokens)

    def end(self, num_dropped: int, num_tokens: int) -> int:
        """Number of blocks, dropped blocks included, that the table of a sequence needs to hold `num_tokens`."""
        count = -(-num_tokens // self.block_size)
        return count if self.max_blocks is None else min(count, num_dropped + self.max_blocks)

    def num_dropped(self, table: list[int]) -> int:
        """Dropped blocks follow the blocks of the sinks. Evicted blocks may be anywhere."""
        if self.interval is not None:
            return table.count(DROPPED)
        first = self.num_sink_blocks
        if len(table) <= first or table[first] != DROPPED:
            return 0
        return bisect_left(table, True, first, key=lambda block: block != DROPPED) - first


def max_blocks_of(max_tokens: int | None, max_step_tokens: int | None, block_size: int) -> int | None:
    """Return the most blocks that a sequence holds in a group whose positions see at most `max_tokens` tokens; None = no limit.

    The blocks hold the visible tokens and the tokens of a forward. Two more blocks are needed, because `drop` keeps whole blocks,
    and a forward may begin within a block.
    """
    if max_tokens is None or max_step_tokens is None:
        return None
    return -(-(max_tokens + max_step_tokens) // block_size) + 2
