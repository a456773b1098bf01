"""One forward as plain tensors and KV operations.

A `Batch` knows no Sequence, pool or plan, so that it can be captured, sent to other ranks, or overlapped. Tokens of all
sequences lie flat, one after another: `T` query tokens, `R` rows of logits that are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pitlane.engine.kv.operations import Operation
from pitlane.engine.kv.pool import Span

if TYPE_CHECKING:
    from torch import Tensor

MOST_SHORT = 72  # tokens of a short query: a draft of 64 and some


@dataclass(slots=True)
class Query:
    """The query tokens `[begin, end)` of one sequence in a batch, and the KV that they alone see, so not what `Reads` holds.

    spans: per KV group, the slots of the tokens before this sequence's first query token (within the window); where the query is
    short, those of its own tokens too, so that a token is computed alike alone and among draft tokens.
    ancestors: [n, n] bool for a draft tree (row sees column), None for causal; n = end - begin.
    masks: what attention made of them for this batch, by group and span; the same in all layers.
    """

    begin: int
    end: int
    spans: list[list[Span]]
    ancestors: Tensor | None = None
    masks: dict[tuple[int, Span], Any] = field(default_factory=dict)

    @property
    def is_short(self) -> bool:
        """One token, one with a draft, or so few that a mask over all that they see costs little."""
        return self.end - self.begin <= MOST_SHORT


@dataclass(frozen=True, slots=True)
class Gather:
    """Short contexts of B sequences with one query token each, to be copied side by side and attended to in one call.

    rows: [B] indices into T; None is all of them, in order. slots: [B * S], a context shorter than S being filled up with its
    own last slot. bias: [B, 1, 1, S] in the model's dtype, 0 where a slot is seen, -inf where it fills up.
    """

    rows: Tensor | None
    slots: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Shared:
    """Adjacent slots that the query tokens of several sequences see whole: rows [n], indices into T."""

    rows: Tensor
    span: Span


@dataclass(frozen=True, slots=True)
class Reads:
    """The stored KV of one group that is not read sequence by sequence."""

    gathers: list[Gather] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """token_ids, positions: [T] int64; slots: per group [T] int64; logit_rows: [R] indices into T.

    reads: per group, what the attention planned (the core's: `Reads`); empty if every sequence reads its KV alone.
    """

    token_ids: Tensor
    positions: Tensor
    slots: list[Tensor]
    queries: list[Query]
    logit_rows: Tensor
    operations: list[Operation] = field(default_factory=list)
    reads: list[Any] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])
