"""One forward as plain tensors and KV operations.

A `Batch` knows no Sequence, pool or plan, so that it can be captured, sent to other ranks, or overlapped. Tokens of all
sequences lie flat, one after another: `T` query tokens, `R` rows of logits that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class Span(NamedTuple):
    """Adjacent slots of one sequence's KV: slots `[start, stop)` hold the tokens from index `first` on."""

    start: int
    stop: int
    first: int


@dataclass(slots=True)
class Query:
    """The query tokens `[begin, end)` of one sequence in a batch, and the KV that they may see.

    spans: per KV group, the slots of all tokens before this sequence's first query token (within the window).
    own: per KV group, the same with the query tokens' own slots; used when there is one query token.
    ancestors: [n, n] bool for a draft tree (row sees column), None for causal; n = end - begin.
    """

    begin: int
    end: int
    spans: list[list[Span]]
    own: list[list[Span]]
    ancestors: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the KV of `sources` to `targets`, slots of one group; sources are read before any target is written."""

    group: int
    sources: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """Write saved KV into n slots of every group; tensors are named `group.0`, ... each `[2, L, Hkv, n, D]`."""

    slots: list[list[int]]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Save:
    """Read the KV of slots of every group into fresh host tensors (named as in `Load`) and hand them to `sink`."""

    slots: list[list[int]]
    sink: Callable[[dict[str, Tensor]], object]


Operation: TypeAlias = Copy | Load | Save


@dataclass(slots=True)
class Batch:
    """token_ids, positions: [T] int64; slots: per group [T] int64; logit_rows: [R] indices into T."""

    token_ids: Tensor
    positions: Tensor
    slots: list[Tensor]
    queries: list[Query]
    logit_rows: Tensor
    operations: list[Operation] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])
