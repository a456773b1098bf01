"""Which stored tokens a position sees.

A position sees the tokens from a start up to itself. The start depends on the position alone and never decreases. So chunks,
drafts, batches and prefix hits change nothing, and a block before the start of the next position is free for good.

A visibility may also keep sinks: the first tokens of a sequence (Xiao et al. 2023, arXiv:2309.17453). A position sees the sinks
before its start as if the tokens between them and its start did not exist. RoPE attention depends on distances alone, so the
stored keys stay, and a position reads the sinks with a second query, rotated by `sink_positions`.

An `Eviction` drops blocks by their keys. It decides at fixed places of the text, after every `interval` tokens, from the keys of
committed tokens alone. No forward has tokens on both sides of such a place. So chunks, drafts and batches change nothing here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.engine.kv.state import KVGroup

Positions = npt.NDArray[np.int64]


class Visibility(Protocol):
    """max_tokens: the most tokens that a position sees, its own included; None = no limit, and no block is dropped.

    A visibility with sinks also has an attribute `num_sinks`: the first tokens that a position sees besides its window.
    """

    if TYPE_CHECKING:  # for type checkers a property; at run time a subclass may set the attribute

        @property
        def max_tokens(self) -> int | None: ...

    def starts(self, positions: Positions) -> Positions:
        """Return the index of the first token that each position sees."""


class Eviction(Visibility, Protocol):
    """A visibility that drops full blocks by their keys. A position sees all tokens before it that its sequence still holds.

    interval: tokens between two evictions, in whole blocks. After an eviction, a sequence holds at most `max_tokens - interval`
    tokens. `starts` returns zeros. A block keeps its positions: keys are not rotated again, so the context of the model still ends
    a text.
    """

    if TYPE_CHECKING:

        @property
        def interval(self) -> int:
            """Tokens between two evictions, in whole blocks."""

    def score(self, keys: Tensor) -> float:
        """Score a full block by its keys [L, Hkv, N, D], as stored, in all layers of the group. Called once per block."""

    def evicted(self, scores: Mapping[int, float]) -> list[int]:
        """Return the blocks to drop. scores: the score of every block that the sequence holds, by its index, in order."""


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


def evicts(visibility: Visibility) -> TypeGuard[Eviction]:
    """Whether a visibility drops blocks by their keys."""
    return hasattr(visibility, "evicted")


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


def checked_eviction(eviction: Eviction, group: KVGroup, block_size: int, context: int) -> Eviction:
    """Return the eviction of a plugin. Raises ValueError if its numbers do not fit the group, the blocks and the context."""
    interval, limit = eviction.interval, eviction.max_tokens
    if group.window is not None:
        raise ValueError(f"a group with a window of {group.window} tokens of its own cannot evict blocks")
    if interval < block_size or interval % block_size:
        raise ValueError(f"interval is {interval}, and must be a multiple of {block_size} tokens")
    if limit is None or limit < interval + block_size:
        raise ValueError(f"max_tokens is {limit}, and must hold the interval of {interval} tokens and a block")
    if np.asarray(eviction.starts(np.arange(context))).any() or num_sinks_of(eviction):
        raise ValueError("an eviction has no sinks, and its starts are 0 at every position")
    return eviction
