"""Functions that decide whether two answers differ only at ties.

Make reference answers with `logprobs=50`. With temperature, also set `top_k` below 50: then the logprobs include tokens that top-k
cuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.decode.sampling import gumbel
from pitlane.engine.events import Result


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs or that only the longer sequence has; None for equal sequences."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def clearness(reference: Result, at: int, other: int, sampling: SamplingParams) -> float:
    """Distance in logits between `reference` and an answer that has token `other` at index `at`.

    It is the smaller of two distances: between the scores of the two tokens, and from either token to the edge of top-k.
    """
    assert reference.logprobs is not None, "make the reference with logprobs=50"
    logprobs = dict(sorted(reference.logprobs[at].items(), key=lambda item: -item[1]))
    assert other in logprobs, f"token {other} is not among the {len(logprobs)} likeliest"
    chosen = reference.token_ids[at]
    if sampling.temperature == 0:
        return logprobs[chosen] - logprobs[other]
    assert 0 < sampling.top_k < len(logprobs), "sample with top_k below the number of logprobs"
    ids, values = np.array(list(logprobs)), np.array(list(logprobs.values()))
    position = reference.stats["prompt_tokens"] + at
    noise = gumbel(reference.stats["seed"], sampling.sample_index, position, ids)
    scores = dict(zip(ids.tolist(), (values + sampling.temperature * noise).tolist(), strict=True))
    edge = float(values[sampling.top_k - 1] + values[sampling.top_k]) / 2
    to_edge = min(abs(logprobs[chosen] - edge), abs(logprobs[other] - edge))
    return float(min(abs(scores[chosen] - scores[other]), to_edge))


def assert_only_ties_differ(
    references: Sequence[Result], results: Sequence[Result], sampling: SamplingParams, rounding: float
) -> int:
    """Assert that every answer equals its reference, or first differs from it at a tie closer than `rounding` (in logits).

    Returns the number of answers that differ.
    """
    num_different = 0
    for reference, result in zip(references, results, strict=True):
        at = first_difference(reference.token_ids, result.token_ids)
        if at is not None:
            num_different += 1
            distance = clearness(reference, at, result.token_ids[at], sampling)
            assert distance < rounding, f"token {at} differs though the choice was clear by {distance:.3g}"
    return num_different


def choice_gap(logit_gap: float, tokens: tuple[int, int], sampling: SamplingParams, seed: int, position: int) -> float:
    """The lead of the first of two tokens at a position, in logits. Near 0, the choice is a tie that rounding can tip.

    logit_gap: logit of the first token less logit of the second. With temperature, a choice is the argmax of
    logit / T + noise, so the difference of their noise counts, times T.
    """
    if sampling.temperature == 0:
        return logit_gap
    first, second = gumbel(seed, sampling.sample_index, position, np.array(tokens, dtype=np.int64))
    return float(logit_gap + sampling.temperature * (first - second))
