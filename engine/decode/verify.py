"""Verification of drafts: sample every row by the one sampling function, follow the child that equals it.

The engine's, never a plugin's: whatever a drafter proposes, the tokens are those of plain decoding with that seed. The first
sampled token that is no child of its node ends the walk and is the bonus token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from pitlane.engine.decode.sampling import logprobs_of, penalise, sample
from pitlane.engine.errors import ModelError
from pitlane.engine.plan.dispatch import own_failure
from pitlane.engine.types import Draft, Rows, Sequence


class Verified(NamedTuple):
    """token_ids: accepted drafts and the bonus token; nodes: indices of the accepted draft tokens, in order.

    targets: where asked for, the target's token after the last known token and after every draft token, rejected ones too.
    """

    token_ids: list[int]
    nodes: list[int]
    logprobs: list[dict[int, float]]
    targets: list[int]


def merged_children(draft: Draft | None) -> dict[int, dict[int, int]]:
    """Children of each node by token id: {node: {token id: child}}, node -1 being the last known token.

    Equal siblings are merged: the later one's children become the first one's.
    """
    children: dict[int, dict[int, int]] = {}
    if draft is None:
        return children
    merged = {-1: -1}
    for index, token in enumerate(draft.token_ids):
        parent = draft.parents[index] if draft.parents is not None else index - 1
        merged[index] = children.setdefault(merged[parent], {}).setdefault(token, index)
    return children


def depths(parents: SequenceOf[int]) -> list[int]:
    """Depth of each draft token: 1 for a child of the last known token."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def clean(draft: Draft | None, limit: int, vocab_size: int) -> Draft | None:
    """A draft as the engine takes it: at most `limit` tokens, cut before the first that is not a valid node."""
    if draft is None:
        return None
    tokens: list[int] = []
    parents = None if draft.parents is None else [int(parent) for parent in draft.parents]
    for index, token in enumerate(list(draft.token_ids)[: max(0, limit)]):
        bad_parent = parents is not None and (index >= len(parents) or not -1 <= parents[index] < index)
        if bad_parent or not 0 <= int(token) < vocab_size:
            break
        tokens.append(int(token))
    if not tokens:
        return None
    if parents is not None and parents[: len(tokens)] == list(range(-1, len(tokens) - 1)):
        parents = None
    return Draft(tokens, None if parents is None else parents[: len(tokens)])


def verify(
    seq: Sequence,
    logits: Tensor,
    draft: Draft | None,
    want_targets: bool = False,
    greedy: SequenceOf[int] | None = None,
    raw: Tensor | None = None,
    peaks: SequenceOf[float] | None = None,
) -> Verified:
    """Walk the draft. logits [1 + K, V], adjusted: row 0 follows the last known token, row 1 + i draft token i.

    greedy: the argmax of every row, if the sequence is greedy and the argmax is known. raw: the model's own logits, from which
    log-probabilities are reported. peaks: the largest logit of every row; the walk ends before a row without a finite peak: the
    next step tells whether the model or a plugin caused it.
    """
    raw = logits if raw is None else raw
    children = merged_children(draft)
    drawn = greedy or (_targets(seq, logits, draft) if want_targets else [])
    targets = list(drawn) if want_targets else []
    tokens: list[int] = []
    nodes: list[int] = []
    logprobs: list[dict[int, float]] = []
    node = -1
    while True:
        row = logits[node + 1]
        position = seq.num_tokens + len(tokens)
        token = drawn[node + 1] if drawn else sample(row, seq.sampling, seq.seed, position)
        if seq.sampling.logprobs is not None:
            logprobs.append(logprobs_of(raw[node + 1], token, seq.sampling.logprobs))
        tokens.append(token)
        child = children.get(node, {}).get(token)
        if child is None or (peaks is not None and not isfinite(peaks[child + 1])):
            return Verified(tokens, nodes, logprobs, targets)
        nodes.append(child)
        node = child


def _targets(seq: Sequence, logits: Tensor, draft: Draft | None) -> list[int]:
    """The token that the target gives after every row."""
    if seq.sampling.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    links = draft.parents if draft is not None and draft.parents is not None else range(-1, len(logits) - 2)
    places = [0, *depths(links)]
    return [
        sample(row, seq.sampling, seq.seed, seq.num_tokens + place) for row, place in zip(logits, places, strict=True)
    ]


def verify_rows(
    rows: Rows, adjust_logits: Callable[[Rows], None], want_targets: bool = False
) -> list[tuple[Sequence, Verified]]:
    """Penalties, `adjust_logits`, then the walk of every sequence of one plan that has no error."""
    bounds = [i for i, parent in enumerate(rows.parents) if parent < 0] + [len(rows.parents)]
    raw = rows.logits
    peaks, greedy = _largest(raw)
    for seq, place in zip(rows.seqs, bounds, strict=False):
        if not isfinite(peaks[place]):
            seq.error = ModelError(
                f"the model's logits hold {peaks[place]} after token {seq.num_tokens}; take another --dtype, or check its weights"
            )
    _penalise(rows)
    adjust_logits(rows)
    if rows.logits is not raw:
        peaks, greedy = _largest(rows.logits)
    found = []
    for seq, (begin, end) in zip(rows.seqs, pairwise(bounds), strict=True):
        if seq.error:
            continue
        own, best = slice(begin, end), greedy[begin:end] if seq.sampling.temperature == 0 else None
        with own_failure(seq):
            found.append((seq, verify(seq, rows.logits[own], seq.draft, want_targets, best, raw[own], peaks[own])))
    return found


def _largest(logits: Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of every row, and its token; of equal ones the first, a NaN before all others.

    One pass by `max`: `amax` of a single row of 49,152 starts OpenMP's threads, which then spin beside the kernels' own (8 % of
    a step of SmolLM2 on two cores), and `argmax` takes four times as long.
    """
    peaks, tokens = logits.max(-1)
    return peaks.tolist(), tokens.tolist()


def _penalise(rows: Rows) -> None:
    """Apply the penalties of the sequences that have some, to a copy."""
    penalised = [i for i, index in enumerate(rows.seq_index) if rows.seqs[index].sampling.has_penalties]
    if penalised:
        rows.logits = rows.logits.float() if rows.logits.dtype.itemsize < 4 else rows.logits.clone()
    for i in penalised:
        seq = rows.seqs[rows.seq_index[i]]
        prompt, completion = seq.token_ids[: seq.num_prompt_tokens], seq.token_ids[seq.num_prompt_tokens :]
        rows.logits[i] = penalise(rows.logits[i], prompt, completion + rows.path(i), seq.sampling)
