"""One forward as plain tensors and KV operations, and the builder that makes it from chunks of sequences.

A `Batch` knows no Sequence, pool or plan, so that it can be captured, sent to other ranks, or overlapped. The tokens of all
sequences lie flat, one sequence after another: `T` query tokens, `R` rows of logits to compute. A `Chunk` is the part of a sequence
that a forward computes. The builder knows the pool and the attention of one model. It knows no plan and no request, so draft
models use it too.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pitlane.engine.decode.draft import Draft, depths
from pitlane.engine.kv.operations import Operation
from pitlane.engine.kv.pool import Pool, Span
from pitlane.engine.kv.state import KVState
from pitlane.engine.kv.store import KVStore

MOST_SHORT = 72  # most tokens of a short query: room for a token with a draft of 64


@dataclass(slots=True)
class Query:
    """The query tokens `[begin, end)` of one sequence in a batch, and the KV that no other sequence of the batch reads with it.

    spans: per KV group, the slots of the tokens before the first query token (within the window), without the slots in `Reads`.
    A short query has the slots of its own tokens too, so that a token is computed alike alone and among draft tokens.
    ancestors: [n, n] bool for a draft tree (row sees column), None for causal; n = end - begin.
    masks: the masks that attention made for this batch, by group and span; all layers use them.
    """

    begin: int
    end: int
    spans: list[list[Span]]
    ancestors: Tensor | None = None
    masks: dict[tuple[int, Span], Any] = field(default_factory=dict)

    @property
    def is_short(self) -> bool:
        """Whether a mask over all keys costs little: one token, a token with a draft, or a short piece of a prompt."""
        return self.end - self.begin <= MOST_SHORT


@dataclass(frozen=True, slots=True)
class Gather:
    """Short contexts of B sequences with one query token each. One attention call reads copies of all of them, side by side.

    rows: [B] indices into T; None = all rows in order. slots: [B * S]; a context shorter than S is padded with its last slot.
    bias: [B, 1, 1, S] in the model's dtype: 0 for a slot of the context, -inf for padding.
    """

    rows: Tensor | None
    slots: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Shared:
    """Adjacent slots that several sequences see completely. rows: [n] indices of their query tokens into T."""

    rows: Tensor
    span: Span


@dataclass(frozen=True, slots=True)
class Reads:
    """The stored KV of one group that is read for several sequences at once."""

    gathers: list[Gather] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """token_ids, positions: [T] int64; slots: per group [T] int64; logit_rows: [R] indices into T.

    reads: per group, the result of `Attention.plan` (of the core: `Reads`); empty if every sequence reads its KV alone.
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


class Attention(Protocol):
    """The attention of a lane, as `build_attention` returns it. `plan` runs per step and KV group, `__call__` per layer."""

    def plan(self, pool: Pool, group: int, kvs: SequenceOf[KVState], queries: list[Query], dtype: torch.dtype) -> Any:
        """Return the value of `batch.reads[group]`. Append to `spans` of every query the spans that it reads alone."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        """q [T, H, D], fresh k and v [T, Hkv, D] (already in the store) -> [T, H, D]."""


class Chunk(NamedTuple):
    """Tokens of one sequence to compute: known tokens from `kv.num_computed_tokens` on, then a draft.

    wants_logits: `token_ids` ends with the last known token, so the batch gets its row of logits.
    """

    kv: KVState
    token_ids: SequenceOf[int]
    draft: Draft | None
    wants_logits: bool


class BatchBuilder:
    """Builds the batches of one model. The caller has reserved the slots of every chunk."""

    def __init__(self, pool: Pool, attention: Attention, dtype: torch.dtype, device: torch.device) -> None:
        self.pool, self.attention, self.dtype, self.device = pool, attention, dtype, device

    def build(self, chunks: SequenceOf[Chunk]) -> Batch:
        """Build the batch of chunks, in order. Moves the pool's operations into it. Without chunks, it has operations alone."""
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        slots: list[list[int]] = [[] for _ in self.pool.groups]
        queries: list[Query] = []
        for kv, known, draft, wants_logits in chunks:
            begin, first = len(token_ids), kv.num_computed_tokens
            token_ids += known
            positions += range(first, first + len(known))
            if wants_logits:
                logit_rows.append(len(token_ids) - 1)
            ancestors = None
            if draft is not None:
                logit_rows += range(len(token_ids), len(token_ids) + len(draft.token_ids))
                token_ids += draft.token_ids
                positions += _draft_positions(draft, first + len(known))
                if draft.parents is not None:
                    ancestors = _ancestors(draft.parents).to(self.device)
            for group, group_slots in enumerate(slots):
                group_slots += self.pool.slots(kv, group, first, first + len(token_ids) - begin)
            queries.append(Query(begin, len(token_ids), [], ancestors))
        kvs = [chunk.kv for chunk in chunks]
        reads = [
            self.attention.plan(self.pool, group, kvs, queries, self.dtype)
            for group in range(len(slots) if chunks else 0)
        ]
        lists = [token_ids, positions, logit_rows, *slots]
        flat = torch.tensor(list(chain.from_iterable(lists)), device=self.device)  # a single copy to the device
        ids, places, rows, *targets = flat.split([len(part) for part in lists])
        return Batch(ids, places, targets, queries, rows, self.pool.queue.take(), reads)


def _draft_positions(draft: Draft, first: int) -> SequenceOf[int]:
    if draft.parents is None:
        return range(first, first + len(draft.token_ids))
    return [first - 1 + depth for depth in depths(draft.parents)]


def _ancestors(parents: SequenceOf[int]) -> torch.Tensor:
    """[1 + K, 1 + K] bool: a node sees the last known token, its ancestors and itself."""
    size = 1 + len(parents)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[0, 0] = True
    for index, parent in enumerate(parents):
        mask[index + 1] = mask[parent + 1]
        mask[index + 1, index + 1] = True
    return mask
