"""Verification of drafts: sample a token, step to the draft node with this token, repeat.

The engine verifies, never a plugin. So no drafter can change the tokens: they equal plain decoding with the same seed. The walk
ends with the first sampled token that is not in the draft, the bonus token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from math import inf, isfinite
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pitlane.engine.border import shown
from pitlane.engine.decode.draft import Draft, depths, merged_children
from pitlane.engine.decode.rows import Rows
from pitlane.engine.decode.sampling import logprobs_of, penalise, sample
from pitlane.engine.errors import ModelError
from pitlane.engine.plan.dispatch import Dispatcher, own_failure
from pitlane.engine.plan.hooks import Hook, HookError
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence

Largest: TypeAlias = tuple[list[float], list[int]]  # of every row: the largest logit, and its token
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Verified(NamedTuple):
    """token_ids: accepted drafts and the bonus token; nodes: indices of the accepted draft tokens, in order.

    targets: the target's token for every row, so after rejected draft tokens too; [] if they were not drawn.
    """

    token_ids: list[int]
    nodes: list[int]
    logprobs: list[dict[int, float]]
    targets: list[int]


def verify(
    seq: Sequence, logits: Tensor, draft: Draft | None, targets: list[int], raw: Tensor, peaks: SequenceOf[float]
) -> Verified:
    """Walk the draft. logits [1 + K, V], adjusted: row 0 follows the last known token, row 1 + i follows draft token i.

    targets: the target's token of every row, if known; else []. raw: the model's own logits, for the reported log-probabilities.
    peaks: the largest logit of every row. The walk ends before a row without a finite peak; the next step then computes this row
    as row 0, and reports the error.
    """
    children = merged_children(draft)
    tokens: list[int] = []
    nodes: list[int] = []
    logprobs: list[dict[int, float]] = []
    node = -1
    while True:
        row = logits[node + 1]
        position = seq.num_tokens + len(tokens)
        token = targets[node + 1] if targets else sample(row, seq.request.sampling, seq.request.seed, position)
        if seq.request.sampling.logprobs is not None:
            logprobs.append(logprobs_of(raw[node + 1], token, seq.request.sampling.logprobs))
        tokens.append(token)
        child = children.get(node, {}).get(token)
        if child is None or not isfinite(peaks[child + 1]):
            return Verified(tokens, nodes, logprobs, targets)
        nodes.append(child)
        node = child


def _targets(seq: Sequence, logits: Tensor, draft: Draft | None) -> list[int]:
    """The target's token after every row."""
    request, places = seq.request, [0, *depths(draft.links if draft is not None else ())]
    return [
        sample(row, request.sampling, request.seed, seq.num_tokens + place)
        for row, place in zip(logits, places, strict=True)
    ]


def verify_rows(
    rows: Rows,
    dispatch: Dispatcher,
    want_targets: bool = False,
    draw: Callable[[Rows], list[int] | None] = lambda rows: None,
) -> list[tuple[Sequence, Verified]]:
    """Verify the sequences of one plan: apply penalties, fold `adjust_logits`, then walk every sequence without an error.

    draw: draws the token after every row; None = the host draws the tokens of the walk.
    """
    bounds = [i for i, parent in enumerate(rows.parents) if parent < 0] + [len(rows.parents)]
    raw = rows.logits
    peaks, greedy = _largest(raw)
    for seq, place in zip(rows.seqs, bounds, strict=False):
        if not isfinite(peaks[place]):
            seq.error = ModelError(
                f"the model's logits hold {peaks[place]} after token {seq.num_tokens}; try another --dtype, or check the weights"
            )
    _penalise(rows)
    largest = adjust_logits(rows, dispatch)
    if largest is not None or rows.logits is not raw:
        peaks, greedy = largest or _largest(rows.logits)
    tokens = draw(rows)
    pairs = []
    for seq, (begin, end) in zip(rows.seqs, pairwise(bounds), strict=True):
        if seq.error:
            continue
        own, logits = slice(begin, end), rows.logits[begin:end]
        with own_failure(seq):
            if seq.request.sampling.temperature == 0:
                targets = greedy[own]
            elif tokens is not None:
                targets = tokens[own]
            else:
                targets = _targets(seq, logits, seq.draft) if want_targets else []
            pairs.append((seq, verify(seq, logits, seq.draft, targets, raw[own], peaks[own])))
    return pairs


def _largest(logits: Tensor) -> Largest:
    """The largest logit of every row, and its token. Equal logits: the first token. NaN is the largest logit.

    `max` gives both in one pass. `amax` of one row of 49,152 logits starts OpenMP's threads, and they spin beside the kernels'
    threads: 8 % of a step of SmolLM2 on two cores. `argmax` takes four times as long.
    """
    peaks, tokens = logits.max(-1)
    return peaks.tolist(), tokens.tolist()


def _penalise(rows: Rows) -> None:
    """Apply penalties to a copy of the logits."""
    penalised = [i for i, index in enumerate(rows.seq_index) if rows.seqs[index].request.sampling.has_penalties]
    if penalised:
        rows.logits = rows.logits.float() if rows.logits.dtype.itemsize < 4 else rows.logits.clone()
    for i in penalised:
        seq = rows.seqs[rows.seq_index[i]]
        num_prompt_tokens = seq.request.num_prompt_tokens
        prompt, completion = seq.token_ids[:num_prompt_tokens], seq.token_ids[num_prompt_tokens:]
        rows.logits[i] = penalise(rows.logits[i], prompt, completion + rows.path(i), seq.request.sampling)


def adjust_logits(rows: Rows, dispatch: Dispatcher) -> Largest | None:
    """Fold `adjust_logits` over the rows of one plan. If a plugin breaks a row, it fails for the sequence of this row alone.

    All plugins work on one copy of the logits, and the values are checked once, after the last plugin. If a plugin fails or the
    values are wrong, the fold starts again from the logits before it, with a copy and a check for every plugin: then the plugin is
    known. So in a step with a failure, a plugin may be called twice. Returns the largest logits, if they are known.
    """
    plan = rows.seqs[0].plan
    if not plan.hook("adjust_logits"):
        return None
    before = rows.logits
    largest = _fold_at_once(rows, plan, dispatch)
    if largest is None:
        rows.logits = before
        _fold_one_by_one(rows, plan.hook("adjust_logits"), dispatch)
    return largest


def _fold_at_once(rows: Rows, plan: Plan, dispatch: Dispatcher) -> Largest | None:
    """The fold on one copy of the logits. Returns None if a plugin failed, or if a next token cannot be drawn."""
    failed: list[HookError] = []
    unchanged: Tensor | None = rows.logits  # a tensor with the values of `rows.logits`, or None
    rows.logits = rows.logits.clone()

    def keep(plugin: Plugin, result: object) -> None:
        if result is not None and result is not rows.logits:
            rows.logits = _checked(result, rows.logits, plugin)

    for is_identical, hooks in plan.logit_runs:
        if is_identical and unchanged is None:
            unchanged = rows.logits.clone()
        dispatch.call(rows.seqs, hooks, keep, failed.append, rows=rows)
        if failed or (is_identical and unchanged is not None and not _equal(rows.logits, unchanged)):
            return None
        unchanged = unchanged if is_identical else None
    largest = _largest(rows.logits)
    firsts = (peak for peak, parent in zip(largest[0], rows.parents, strict=True) if parent < 0)
    if all(isfinite(peak) or seq.error for seq, peak in zip(rows.seqs, firsts, strict=True)):
        return largest
    return None


def _fold_one_by_one(rows: Rows, hooks: SequenceOf[Hook], dispatch: Dispatcher) -> None:
    """The fold with a copy and a check for every plugin: a failed plugin changes nothing."""
    before = rows.logits

    def keep(plugin: Plugin, result: object) -> None:
        nonlocal before
        logits = _checked(rows.logits if result is None else result, before, plugin)
        if plugin.exactness_for(plugin.options) == "identical" and not _equal(logits, before):
            raise ValueError("changed the logits, but is declared identical; declare the plugin steering")
        _undo_broken(rows, logits, before, plugin, dispatch)
        before = logits

    for hook in hooks:
        rows.logits = before.clone()  # a plugin may write into these logits and then raise
        dispatch.call(rows.seqs, [hook], keep, rows=rows)
        rows.logits = before


def _undo_broken(rows: Rows, logits: Tensor, before: Tensor, plugin: Plugin, dispatch: Dispatcher) -> None:
    """Undo a plugin's change for the sequences whose next token can no longer be drawn."""
    places = [place for place, parent in enumerate(rows.parents) if parent < 0]
    for seq, peak in zip(rows.seqs, logits[places].amax(-1).tolist(), strict=True):
        if isfinite(peak) or seq.error:
            continue
        fault = "forbids every token" if peak == -inf else f"returned logits that hold {peak}"
        own = [row for row, index in enumerate(rows.seq_index) if rows.seqs[index] is seq]
        logits[own] = before[own].to(logits.dtype)
        cause = ValueError(f"{fault}, after token {seq.num_tokens}")
        dispatch.drop([seq], HookError(plugin, "adjust_logits", cause))


def _checked(logits: object, before: Tensor, plugin: Plugin) -> Tensor:
    """Return the logits, or raise: wrong type, shape, dtype or device."""
    if not isinstance(logits, Tensor) or logits.shape != before.shape:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else shown(logits)
        raise TypeError(f"returned {got}, not a tensor of shape {tuple(before.shape)}")
    if logits.dtype not in FLOATS or logits.device != before.device:
        raise TypeError(f"returned {logits.dtype} on {logits.device}, not {before.dtype} on {before.device}")
    return logits


def _equal(logits: Tensor, before: Tensor) -> bool:
    if logits.dtype == before.dtype and torch.equal(logits, before):
        return True
    return torch.equal(logits.to(before.dtype).nan_to_num(), before.nan_to_num())
