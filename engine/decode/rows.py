"""The logits that a step wants, by plan."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pitlane.engine.decode.draft import Draft
from pitlane.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Rows:
    """The wanted logits of one plan, `logits [R, V]`.

    Row i belongs to `seqs[seq_index[i]]` and follows row `parents[i]`; -1: it follows the known tokens. token_ids[i]: the draft
    token that row i stands for; of a row with parent -1, the last known token.
    """

    logits: Tensor
    seqs: list[Sequence]
    seq_index: list[int]
    parents: list[int]
    token_ids: list[int]

    def path(self, row: int) -> list[int]:
        """Draft tokens between the known ones and this row's prediction, in order."""
        path = []
        while self.parents[row] >= 0:
            path.append(self.token_ids[row])
            row = self.parents[row]
        return path[::-1]


def split_rows(logits: Tensor, seqs: SequenceOf[Sequence]) -> list[Rows]:
    """Split logits [R, V] of a batch by plan. `seqs`: the sequences that have rows, in the order of the batch."""
    bounds: dict[int, tuple[int, int]] = {}
    start = 0
    for seq in seqs:
        bounds[seq.id] = start, start + 1 + seq.num_draft_tokens
        start += 1 + seq.num_draft_tokens
    by_plan: dict[int, list[Sequence]] = {}
    for seq in seqs:
        by_plan.setdefault(id(seq.plan), []).append(seq)
    return [_rows_of(logits, plan_seqs, [bounds[seq.id] for seq in plan_seqs]) for plan_seqs in by_plan.values()]


def _rows_of(logits: Tensor, seqs: list[Sequence], bounds: list[tuple[int, int]]) -> Rows:
    seq_index: list[int] = []
    parents: list[int] = []
    token_ids: list[int] = []
    for index, seq in enumerate(seqs):
        base = len(parents)
        draft = seq.draft or Draft(())
        links = draft.parents if draft.parents is not None else range(-1, len(draft.token_ids) - 1)
        parents += [-1, *(base + 1 + parent for parent in links)]
        token_ids += [seq.token_ids[-1], *draft.token_ids]
        seq_index += [index] * (1 + len(draft.token_ids))
    if all(left[1] == right[0] for left, right in pairwise(bounds)):
        return Rows(logits[bounds[0][0] : bounds[-1][1]], seqs, seq_index, parents, token_ids)
    import torch  # plugins import `Rows`, and finding plugins imports no torch

    own = torch.cat([logits[start:stop] for start, stop in bounds])
    return Rows(own, seqs, seq_index, parents, token_ids)
