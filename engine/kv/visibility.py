"""Which stored tokens a position sees.

A position sees the tokens from a start up to itself. The start depends on the position alone and never decreases. So chunks,
drafts, batches and prefix hits change nothing, and a block before the start of the next position is free for good.

A visibility may also keep sinks: the first tokens of a sequence (Xiao et al. 2023, arXiv:2309.17453). A position sees the sinks
before its start as if the tokens between them and its start did not exist. RoPE attention depends on distances alone, so the
stored keys stay, and a position reads the sinks with a second query, rotated by `sink_positions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pitlane.engine.kv.state import KVGroup

Positions = npt.NDArray[np.int64]


class Visibility(Protocol):
    """max_tokens: the most tokens that a position sees, its own included; None = no limit, and no block is dropped.

    A visibility with sinks also has an attribute `num_sinks`: the first tokens that a position sees besides its window.
    """

    @property
    def max_tokens(self) -> int | None: ...

    def starts(self, positions: Positions) -> Positions:
        """Return the index of the first token that each position sees."""


@dataclass(frozen=True, slots=True)
class FullAttention:
    """A position sees all tokens before it."""

    max_tokens: int | None = None

    def starts(self, positions: Positions) -> Positions:
        return np.zeros_like(positions)


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """A position sees the last `window` tokens, its own included."""

    window: int

    @property
    def max_tokens(self) -> int:
        return self.window

    def starts(self, positions: Positions) -> Positions:
        return np.maximum(positions - (self.window - 1), 0)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A position sees the tokens that both visibilities show."""

    first: Visibility
    second: Visibility

    @property
    def max_tokens(self) -> int | None:
        limits = [v.max_tokens for v in (self.first, self.second) if v.max_tokens is not None]
        return min(limits) + self.num_sinks if limits else None

    @property
    def num_sinks(self) -> int:
        return num_sinks_of(self.second)

    def starts(self, positions: Positions) -> Positions:
        return np.maximum(self.first.starts(positions), self.second.starts(positions))


def num_sinks_of(visibility: Visibility) -> int:
    """Return how many first tokens of a sequence a position sees besides its window."""
    num_sinks: int = getattr(visibility, "num_sinks", 0)
    return num_sinks


def sink_positions(starts: Positions, positions: Positions, num_sinks: int) -> Positions:
    """Return the positions that rotate the second query: the distance to the sinks leaves out the tokens between."""
    return positions - np.maximum(starts - num_sinks, 0)


def max_held_tokens(visibility: Visibility, block_size: int) -> int | None:
    """Return the most visible tokens that a sequence holds for a position. The blocks of the sinks are held whole."""
    if visibility.max_tokens is None:
        return None
    return visibility.max_tokens + -num_sinks_of(visibility) % block_size


def visibility_of(group: KVGroup, trim: Visibility | None = None) -> Visibility:
    """Return the visibility of a group of the model. trim: a plugin narrows it."""
    if group.window is None:
        return trim or FullAttention()
    own = SlidingWindow(group.window)
    return own if trim is None else Narrowed(own, trim)


def checked(visibility: Any, context: int) -> Visibility:
    """Return the visibility of a plugin. Raises TypeError or ValueError if it breaks the contract in the first `context` tokens."""
    positions = np.arange(context)
    starts, limit = np.asarray(visibility.starts(positions)), visibility.max_tokens
    num_sinks = num_sinks_of(visibility)
    if starts.shape != positions.shape or starts.dtype != positions.dtype:
        raise TypeError(f"starts must be {positions.dtype} {positions.shape}, got {starts.dtype} {starts.shape}")
    if (starts < 0).any() or (starts > positions).any() or (np.diff(starts) < 0).any():
        raise ValueError("starts must lie in [0, position] and never decrease")
    if num_sinks < 0 or (num_sinks and limit is None):
        raise ValueError(f"num_sinks is {num_sinks} and max_tokens {limit}; sinks need a limit and must be >= 0")
    num_seen = positions - starts + 1 + np.minimum(starts, num_sinks)
    if limit is not None and (num_seen > limit).any():
        raise ValueError(f"max_tokens is {limit}, and a position sees {num_seen.max()} tokens")
    result: Visibility = visibility
    return result
