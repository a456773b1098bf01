"""Sampling as a function of the position, compared with rejection sampling (Leviathan et al. 2023; Chen et al. 2023).

Rejection sampling accepts a draft token x ~ q with probability min(1, p(x) / q(x)) and otherwise draws from the residual
max(0, p - q); it accepts with probability sum(min(p, q)), and no method accepts more often. The engine draws draft and target by
argmax of log-probability + the same Gumbel noise, and accepts when the two argmaxes agree (Daliri et al. 2024).
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pitlane import SamplingParams
from pitlane.engine.decode.sampling import sample

Distribution = NDArray[np.float64]
DRAWS = 8_000
SAMPLED = SamplingParams(temperature=1.0)


def zipf(size: int, exponent: float) -> Distribution:
    weights = np.arange(1, size + 1) ** -exponent
    return weights / weights.sum()


def softened(p: Distribution, temperature: float) -> Distribution:
    weights = p ** (1 / temperature)
    return weights / weights.sum()


def disturbed(p: Distribution, deviation: float, seed: int) -> Distribution:
    """The distribution of a draft model: log-probabilities with errors."""
    weights = p * np.exp(deviation * np.random.default_rng(seed).normal(size=len(p)))
    return weights / weights.sum()


PAIRS: dict[str, tuple[Distribution, Distribution]] = {
    "equal": (zipf(40, 1.2), zipf(40, 1.2)),
    "softer": (zipf(40, 1.2), softened(zipf(40, 1.2), 1.5)),
    "good draft": (zipf(200, 1.1), disturbed(zipf(200, 1.1), 0.4, 1)),
    "poor draft": (zipf(200, 1.1), disturbed(zipf(200, 1.1), 1.2, 2)),
    "two tokens": (np.array([0.7, 0.3]), np.array([0.4, 0.6])),
    "nothing in common": (np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.5, 0.5])),
}
each_pair = pytest.mark.parametrize("p, q", list(PAIRS.values()), ids=list(PAIRS))


def overlap(p: Distribution, q: Distribution) -> float:
    """The exact probability that rejection sampling accepts."""
    return float(np.minimum(p, q).sum())


def coupled(p: Distribution, q: Distribution) -> float:
    """The exact probability that the argmaxes of both with the same Gumbel noise agree.

    With exponential clocks E_x of rate 1, p's winner is argmin E_x / p_x. Token x wins both iff every other clock is at least
    E_x * max(p_y / p_x, q_y / q_x): probability 1 / sum_y max(p_y / p_x, q_y / q_x).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(np.nan_to_num(q / p, nan=0.0, posinf=np.inf), kind="stable")
    p, q = p[order], q[order]  # up to token x the ratio of p is larger, behind it the ratio of q
    both = (p > 0) & (q > 0)
    return float((1 / (np.cumsum(p)[both] / p[both] + (q.sum() - np.cumsum(q))[both] / q[both])).sum())


def by_rejection(p: Distribution, q: Distribution) -> tuple[list[int], float]:
    """Draft from q; accept with probability min(1, p / q), or draw from the residual."""
    generator = np.random.default_rng(7)
    drafted = generator.choice(len(q), size=DRAWS, p=q)
    accepted = generator.random(DRAWS) < p[drafted] / q[drafted]
    residual = np.maximum(p - q, 0)
    if residual.sum() == 0:
        residual = p
    redrawn = generator.choice(len(p), size=DRAWS, p=residual / residual.sum())
    return np.where(accepted, drafted, redrawn).tolist(), float(accepted.mean())


def by_function(p: Distribution, q: Distribution) -> tuple[list[int], float]:
    """Draw both by the engine's sampler, position by position; the token is the target's for any draft."""
    with np.errstate(divide="ignore"):
        target, draft = torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q))
    tokens = [sample(target, SAMPLED, 3, position) for position in range(DRAWS)]
    drafted = [sample(draft, SAMPLED, 3, position) for position in range(DRAWS)]
    return tokens, sum(a == b for a, b in zip(tokens, drafted, strict=True)) / DRAWS


def tolerance(chance: float) -> float:
    """Five standard deviations of a mean of `DRAWS` draws."""
    return 5 * math.sqrt(max(chance * (1 - chance), 1e-9) / DRAWS)


def assert_follows(tokens: list[int], p: Distribution) -> None:
    """Chi-square over the tokens that are expected at least ten times; rarer tokens count as one class."""
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    common = DRAWS * p >= 10
    seen, expected = list(counts[common]), list(DRAWS * p[common])
    if (rest := DRAWS * p[~common].sum()) > 0:
        seen.append(counts[~common].sum())
        expected.append(rest)
    statistic = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    freedom = len(seen) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10, f"{statistic:.1f} at {freedom} degrees of freedom"


@each_pair
def test_rejection_sampling_accepts_the_overlap(p: Distribution, q: Distribution) -> None:
    tokens, accepted = by_rejection(p, q)
    assert accepted == pytest.approx(overlap(p, q), abs=tolerance(overlap(p, q)))
    assert_follows(tokens, p)


@each_pair
def test_the_sampling_function_accepts_as_often_as_shared_noise_allows(p: Distribution, q: Distribution) -> None:
    tokens, accepted = by_function(p, q)
    assert accepted == pytest.approx(coupled(p, q), abs=tolerance(coupled(p, q)))
    assert_follows(tokens, p)


@each_pair
def test_both_lie_within_their_bounds(p: Distribution, q: Distribution) -> None:
    """No coupling beats the overlap; shared noise reaches at least overlap / (2 - overlap) (Daliri et al. 2024)."""
    bound, shared = overlap(p, q), coupled(p, q)
    assert bound / (2 - bound) - 1e-12 <= shared <= bound + 1e-12


def test_equal_distributions_are_always_accepted() -> None:
    p, q = PAIRS["equal"]
    assert by_function(p, q)[1] == 1.0
    assert by_rejection(p, q)[1] == 1.0


def test_a_draft_changes_the_tokens_of_rejection_sampling_and_none_of_the_function() -> None:
    """The same seeds and two drafts: rejection sampling draws other tokens of the same distribution."""
    p, good = PAIRS["good draft"]
    poor = PAIRS["poor draft"][1]
    assert by_rejection(p, good)[0] != by_rejection(p, poor)[0]
    assert by_function(p, good)[0] == by_function(p, poor)[0]


def test_independent_noise_accepts_far_less() -> None:
    """Two independent draws agree with probability sum(p * q) only; shared noise makes them agree more often."""
    p, q = PAIRS["good draft"]
    assert coupled(p, q) > 3 * float((p * q).sum())


# ---- on the bundled pair


@pytest.fixture(scope="module")
def pair() -> Any:
    """Target, drafter, and chats about generated documents; the tokens of answers have weight 1."""
    from pitlane.training.corpus import Encoder, Weighting
    from pitlane.training.models import read_model, read_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "examples")
        from bundled_model.docqa.generate import Settings, conversations
    folder = Path(str(resources.files("pitlane.storage") / "bundled"))
    chats = (chat for chat in conversations(Settings("values", "evaluation"), 30) if chat["domain"])
    examples = list(Encoder(read_tokenizer(folder), Weighting(prompt=0.0)).examples(chats))
    return read_model(folder).eval(), read_model(folder / "drafter").eval(), examples


@pytest.mark.slow
@pytest.mark.parametrize("min_weight", [1.0, 0.0], ids=["answers", "all"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_acceptance_on_the_bundled_pair(pair: Any, temperature: float, min_weight: float) -> None:
    """Prints the numbers of docs/exactness.md: `pytest -m slow -s tests/engine/decode/test_rejection_sampling.py`."""
    target, drafter, examples = pair
    overlaps, agreements = [], []
    for example in examples:
        tokens = torch.tensor([example.ids])
        with torch.no_grad():
            both = [(model(tokens).logits[0].double() / temperature).softmax(-1).numpy() for model in (target, drafter)]
        for place in np.flatnonzero(np.array(example.weights[1:]) >= min_weight):
            p, q = both[0][place], both[1][place]
            overlaps.append(overlap(p, q))
            agreements.append(coupled(p, q))
    rejection, function = float(np.mean(overlaps)), float(np.mean(agreements))
    print(
        f"\nT = {temperature}: {len(overlaps)} tokens, rejection sampling {rejection:.3f}, sampling as a function {function:.3f}"
    )
    assert rejection / (2 - rejection) - 1e-3 <= function <= rejection
    assert rejection > (0.9 if min_weight else 0.5), "the drafter imitates the target"
