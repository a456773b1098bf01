"""Lays the tokens of several sequences flat, as one batch.

A `Chunk` is the part of a sequence that a forward computes. The builder knows the pool and the attention of one model; it knows
no plan and no request, so the draft models use it too.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import chain
from typing import NamedTuple

import torch

from pitlane.engine.decode.draft import Draft, depths
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState
from pitlane.engine.run.attention import Attention
from pitlane.engine.run.batch import Batch, Query


class Chunk(NamedTuple):
    """Tokens of one sequence to compute: known tokens from `kv.num_computed_tokens` on, then a draft.

    wants_logits: the last known token is among them, so its row of logits is wanted, and those of the draft.
    """

    kv: KVState
    token_ids: SequenceOf[int]
    draft: Draft | None
    wants_logits: bool


class BatchBuilder:
    """Builds the batches of one model. The slots of every chunk are reserved before."""

    def __init__(self, pool: Pool, attention: Attention, dtype: torch.dtype, device: torch.device) -> None:
        self.pool, self.attention, self.dtype, self.device = pool, attention, dtype, device

    def build(self, chunks: SequenceOf[Chunk]) -> Batch:
        """The batch of these chunks, in order; takes the operations that the pool has ready."""
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
        reads = [self.attention.plan(self.pool, group, kvs, queries, self.dtype) for group in range(len(slots))]
        operations, self.pool.operations = self.pool.operations, []
        lists = [token_ids, positions, logit_rows, *slots]
        flat = torch.tensor(list(chain.from_iterable(lists)), device=self.device)  # one copy to the device, not four
        ids, places, rows, *targets = flat.split([len(part) for part in lists])
        return Batch(ids, places, targets, queries, rows, operations, reads)


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
