"""Which stored tokens a position sees.

A position sees the tokens from a start up to itself. The start depends on the position alone and never decreases. So chunks,
drafts, batches and prefix hits change nothing, and a block before the start of the next position is free for good.
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
    """max_tokens: the most tokens that a position sees, its own included; None = no limit, and no block is dropped."""

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
        return min((v.max_tokens for v in (self.first, self.second) if v.max_tokens is not None), default=None)

    def starts(self, positions: Positions) -> Positions:
        return np.maximum(self.first.starts(positions), self.second.starts(positions))


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
    if starts.shape != positions.shape or starts.dtype != positions.dtype:
        raise TypeError(f"starts must be {positions.dtype} {positions.shape}, got {starts.dtype} {starts.shape}")
    if (starts < 0).any() or (starts > positions).any() or (np.diff(starts) < 0).any():
        raise ValueError("starts must lie in [0, position] and never decrease")
    if limit is not None and (positions - starts >= limit).any():
        raise ValueError(f"max_tokens is {limit}, and a position sees {(positions - starts).max() + 1} tokens")
    result: Visibility = visibility
    return result
