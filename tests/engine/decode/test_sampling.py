"""Sampling is a function: its distribution, its noise, its truncations and penalties, against plain references."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from pitlane import BadOption, SamplingParams
from pitlane.engine.decode import sampling
from pitlane.engine.decode.sampling import NUM_REPEATED, gumbel, logprobs_of, penalise, ranked, sample, survivors

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.0, -3.0], dtype=torch.float64)
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def reference_survivors(scaled: list[float], params: SamplingParams) -> set[int]:
    """The definition, token by token."""
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if params.top_k:
        order = order[: params.top_k]
    top = scaled[order[0]]
    weights = {token: math.exp(scaled[token] - top) for token in order}
    total = math.fsum(weights.values())
    kept: list[int] = []
    for token in order:
        if math.fsum(weights[other] for other in kept) / total < params.top_p:
            kept.append(token)
    return {token for token in kept if weights[token] >= params.min_p * weights[order[0]]}


def reference_probabilities(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    scaled = [value / params.temperature for value in logits.tolist()]
    kept = reference_survivors(scaled, params)
    weights = [math.exp(value) if token in kept else 0.0 for token, value in enumerate(scaled)]
    return [weight / sum(weights) for weight in weights]


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, probabilities, strict=True) if p == 0)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True) if p)


# ---- greedy


def test_greedy_is_the_argmax_whatever_the_other_settings() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = torch.randn(257, generator=generator).to(dtype)
        for params in (SamplingParams(), SamplingParams(top_k=3, top_p=0.1, min_p=0.5, sample_index=4)):
            assert sample(logits, params, seed=9, position=3) == int(logits.argmax())


@pytest.mark.parametrize("params", [{"temperature": 1.7, "top_k": 1}, {"temperature": 1e-9}, {"temperature": 1e-308}])
def test_what_leaves_one_token_is_greedy(params: dict[str, Any]) -> None:
    for seed in range(50):
        assert sample(LOGITS, SamplingParams(**params), seed, seed) == 2


@pytest.mark.parametrize("temperature", [1e-300, 1e-306, 1e-308, 5e-324])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_no_temperature_is_too_low(temperature: float, truncation: dict[str, Any]) -> None:
    """Several of these logits, divided by the temperature, are too large for a float64."""
    params = SamplingParams(temperature=temperature, **truncation)
    for sign in (10, -10):
        expected = int((sign * LOGITS).argmax())
        assert {sample(sign * LOGITS, params, seed, 3) for seed in range(20)} == {expected}


# ---- truncation


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 1e-9},
        {"top_p": 0.37},
        {"top_p": 0.93},
        {"min_p": 0.07},
        {"min_p": 1.0},
        {"top_k": 7, "top_p": 0.61},
        {"top_k": 9, "min_p": 0.21},
        {"top_k": 9, "top_p": 0.83, "min_p": 0.11},
    ],
)
def test_truncation_follows_its_definition(params: dict[str, Any]) -> None:
    generator = random.Random(str(params))
    for _ in range(60):
        coarse = generator.random() < 0.5  # steps of a half: many ties, also at the edge
        scaled = [generator.gauss(0, 2) for _ in range(generator.randint(1, 40))]
        scaled = [round(2 * value) / 2 for value in scaled] if coarse else scaled
        settings = SamplingParams(temperature=1, **params)
        kept = survivors(np.array(scaled), settings).tolist()
        assert len(kept) == len(set(kept))
        assert set(kept) == reference_survivors(scaled, settings)


@pytest.mark.parametrize(
    "params", [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 900, "top_p": 0.5}], ids=str
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_truncation_of_a_whole_vocabulary_follows_its_definition(params: dict[str, Any], spread: float) -> None:
    scaled = np.random.default_rng(3).normal(0, spread, 20_000)
    scaled[1::7], scaled[::911] = scaled[1], -np.inf  # many equal logits, some impossible tokens
    order = np.argsort(-scaled, kind="stable")[: params.get("top_k", len(scaled))]
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    expected = order[before < params.get("top_p", 1)]
    kept = survivors(scaled, SamplingParams(temperature=1, **params))
    assert np.array_equal(np.sort(kept), np.sort(expected))


def test_ties_at_the_edge_go_to_the_lower_token_id() -> None:
    assert survivors(np.zeros(5), SamplingParams(temperature=1, top_k=3)).tolist() == [0, 1, 2]
    assert survivors(np.zeros(5), SamplingParams(temperature=1, top_p=0.3)).tolist() == [0, 1]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_broken_logits_still_give_a_token(truncation: dict[str, Any]) -> None:
    inf, nan = float("inf"), float("nan")
    params = SamplingParams(temperature=0.7, **truncation)
    for values in ([-inf] * 4, [nan] * 4, [1.0, nan, 2.0, -inf]):
        assert sample(torch.tensor(values), params, 1, 2) in range(4)
    for seed in range(20):
        assert sample(torch.tensor([5.0, -inf, inf, 6.0]), params, seed, 2) == 2, "a forced token"
        assert sample(torch.tensor([5.0, -inf, 5.0, -inf]), params, seed, 2) in (0, 2), (
            "tokens without a logit are forbidden"
        )


# ---- the distribution


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.4, "top_k": 5, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_sampling_follows_the_softmax_over_seeds_and_over_positions(params: dict[str, Any]) -> None:
    settings = SamplingParams(**params)
    probabilities = reference_probabilities(LOGITS, settings)
    for draws in (
        [sample(LOGITS, settings, seed, 17) for seed in range(4000)],
        [sample(LOGITS, settings, 17, position) for position in range(4000)],
    ):
        counts = [draws.count(token) for token in range(len(LOGITS))]
        assert chi_square(counts, probabilities) < 30.9  # exceeded once in 1e5 at 5 degrees of freedom
    wrong = reference_probabilities(LOGITS, SamplingParams(**params | {"temperature": params["temperature"] * 1.3}))
    if sum(p > 0 for p in wrong) == sum(p > 0 for p in probabilities) > 1:
        assert chi_square(counts, wrong) > 30.9, "the test sees a temperature that is off by a third"


def test_samples_of_one_prompt_are_independent() -> None:
    pairs = [
        (sample(LOGITS, first, seed, 3), sample(LOGITS, second, seed, 3))
        for first, second in [(SamplingParams(temperature=1), SamplingParams(temperature=1, sample_index=1))]
        for seed in range(6000)
    ]
    p = reference_probabilities(LOGITS, SamplingParams(temperature=1))
    counts = [pairs.count((a, b)) for a in range(5) for b in range(5)]  # token 5 is rare
    expected = [p[a] * p[b] / (1 - p[5]) ** 2 for a in range(5) for b in range(5)]
    assert chi_square(counts, expected) < 65.2  # exceeded once in 1e5 at 24 degrees of freedom


TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"top_p": 0.75},
    {"min_p": 0.3},
    {"top_k": 2, "top_p": 0.9},
    {"top_k": 2, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 2, "top_p": 0.95, "min_p": 0.2},
]
TWO, THREE = [0.4, -0.9], [0.2, 1.1, -0.4]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.sizes(
    "logits, steps",
    default=[(TWO, 64), (THREE, 16)],
    sample=[(TWO, 128), (THREE, 24)],
    whole=[(TWO, 128), (THREE, 24)],
    ids=lambda value: None if isinstance(value, int) else f"{len(value)} tokens",
)
def test_the_whole_cube_of_uniforms_gives_the_softmax(
    monkeypatch: pytest.MonkeyPatch, logits: list[float], steps: int, truncation: dict[str, Any]
) -> None:
    """Every combination of evenly spaced uniforms once, so no chance is left, only the width of a step."""
    params = SamplingParams(temperature=0.8, **truncation)
    tensor = torch.tensor(logits, dtype=torch.float64)
    noise = -np.log(-np.log((np.arange(steps) + 0.5) / steps))
    counts = [0] * len(logits)
    for combination in np.ndindex(*[steps] * len(logits)):
        drawn = noise[list(combination)]
        monkeypatch.setattr(sampling, "gumbel", lambda seed, index, position, ids, drawn=drawn: drawn[ids])
        counts[sample(tensor, params, 0, 0)] += 1
    expected = reference_probabilities(tensor, params)
    shares = [count / steps ** len(logits) for count in counts]
    assert shares == pytest.approx(expected, abs=1 / steps)
    assert [p == 0 for p in shares] == [p == 0 for p in expected]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_every_truncation_leaves_the_softmax_of_the_surviving_tokens(truncation: dict[str, Any]) -> None:
    logits = torch.tensor([0.1, 1.2, -0.7, 0.8, 0.0, 0.4, -1.5, 0.9], dtype=torch.float64)
    params = SamplingParams(temperature=1.1, **({"top_k": 5} | truncation if "top_k" in truncation else truncation))
    probabilities = reference_probabilities(logits, params)
    draws = [sample(logits, params, seed, 40 + seed % 7) for seed in range(4000)]
    freedom = sum(p > 0 for p in probabilities) - 1
    bound = freedom + 4.5 * math.sqrt(2 * freedom) + 12
    assert chi_square([draws.count(token) for token in range(8)], probabilities) < bound


@pytest.mark.parametrize(
    "step", [(1, 0), (0, 1), (1, -1), (2**32, 0)], ids=["seed", "position", "both", "high bits of the seed"]
)
def test_draws_of_neighbours_are_independent(step: tuple[int, int]) -> None:
    params, p = SamplingParams(temperature=1), reference_probabilities(LOGITS, SamplingParams(temperature=1))
    pairs = [
        (sample(LOGITS, params, seed, 50 + seed % 11), sample(LOGITS, params, seed + step[0], 50 + seed % 11 + step[1]))
        for seed in range(0, 10_000, 2)
    ]
    counts = [pairs.count((a, b)) for a in range(5) for b in range(5)]  # token 5 is rare
    expected = [p[a] * p[b] / (1 - p[5]) ** 2 for a in range(5) for b in range(5)]
    assert chi_square(counts, expected) < 65.2  # exceeded once in 1e5 at 24 degrees of freedom


# ---- runners-up, for draft trees


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 9, "min_p": 0.01}])
def test_runners_up_are_the_next_best_of_the_same_draw(params: dict[str, Any]) -> None:
    settings, generator = SamplingParams(**params), torch.Generator().manual_seed(1)
    for seed in range(40):
        logits = torch.randn(30, generator=generator, dtype=torch.float64)
        tokens = ranked(logits, settings, seed, 5, 4)
        assert tokens[0] == sample(logits, settings, seed, 5)
        assert tokens == ranked(logits, settings, seed, 5, 8)[:4] and len(set(tokens)) == 4
        for count in (1, 2, 3):  # without the winner, the runner-up wins
            logits[tokens[count - 1]] = float("-inf")
            if settings.top_k == 0:
                assert sample(logits, settings, seed, 5) == tokens[count]


def test_no_more_runners_up_than_survivors() -> None:
    assert ranked(LOGITS, SamplingParams(), 0, 0, 50) == [2, 0, 4, 3, 1, 5]
    assert sorted(ranked(LOGITS, SamplingParams(temperature=1), 3, 0, 50)) == list(range(6))
    assert set(ranked(LOGITS, SamplingParams(temperature=1, top_k=2), 3, 0, 50)) == {0, 2}


def test_pairs_of_winner_and_runner_up_are_drawn_without_replacement() -> None:
    params, p = SamplingParams(temperature=1), reference_probabilities(LOGITS, SamplingParams(temperature=1))
    pairs = [tuple(ranked(LOGITS, params, seed, 9, 2)) for seed in range(6000)]
    all_pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    expected = [p[a] * p[b] / (1 - p[a]) for a, b in all_pairs]  # Plackett-Luce
    rare = [index for index, chance in enumerate(expected) if 6000 * chance < 8]
    counts = [pairs.count(pair) for pair in all_pairs]
    kept = [index for index in range(len(all_pairs)) if index not in rare]
    frequencies = [*[counts[index] for index in kept], sum(counts[index] for index in rare)]
    chances = [*[expected[index] for index in kept], sum(expected[index] for index in rare)]
    freedom = len(frequencies) - 1
    assert chi_square(frequencies, chances) < freedom + 4.5 * math.sqrt(2 * freedom) + 12


# ---- the noise


def reference_hash(seed: int, sample_index: int, position: int, token: int) -> int:
    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    key = 0
    for part in (seed, sample_index, position):
        key = mix((key + GOLDEN + part) & MASK)
    return mix(mix((token * GOLDEN + key) & MASK))


KNOWN_ANSWERS = {
    (0, 0, 0): [0.0640478918634563, -0.584782800983562, 6.51162746380917, 0.0664963536544744],
    (1, 0, 0): [-0.471845679359974, 0.470759939073088, 1.12808290847858, -0.350468049613184],
    (0, 1, 0): [0.945131740884488, 0.376975389656139, 0.629131834954434, -0.993496735827855],
    (0, 0, 1): [2.8494014020648, -0.323029100831825, 0.710784346312638, -0.945850409438197],
    (9223372036854775807, 3, 1000000): [2.76364657118955, 1.84922766785725, 1.18988444829611, -0.49409743028144],
}


@pytest.mark.parametrize("arguments", list(KNOWN_ANSWERS))
def test_noise_never_changes(arguments: tuple[int, int, int]) -> None:
    """A seed gives the same answer in every version."""
    noise = gumbel(*arguments, np.array([0, 1, 31999, 262143]))
    np.testing.assert_allclose(noise, KNOWN_ANSWERS[arguments], rtol=1e-12)


def test_noise_is_the_documented_function() -> None:
    generator = random.Random(1)
    for _ in range(200):
        seed, index = generator.randrange(2**63), generator.randrange(8)
        position, token = generator.randrange(10**6), generator.randrange(2**18)
        uniform = (reference_hash(seed, index, position, token) >> 11 | 1) * 2.0**-53
        expected = -math.log(-math.log(uniform))
        assert gumbel(seed, index, position, np.array([token]))[0] == pytest.approx(expected, rel=1e-12)


def test_noise_has_the_moments_of_gumbel() -> None:
    noise = np.concatenate([gumbel(seed, 0, 5, np.arange(20_000)) for seed in range(5)])
    n = len(noise)
    deviation = math.pi / math.sqrt(6)
    assert abs(noise.mean() - 0.5772156649) < 5 * deviation / math.sqrt(n)
    assert abs(noise.var() - deviation**2) < 5 * math.sqrt(4.4 / n) * deviation**2  # kurtosis of a Gumbel is 5.4
    uniform = np.sort(np.exp(-np.exp(-noise)))
    assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n), "Kolmogorov-Smirnov"


def test_noise_of_other_seeds_positions_samples_and_tokens_is_uncorrelated() -> None:
    ids = np.arange(20_000)
    base = gumbel(7, 0, 100, ids)
    others = {
        "seed + 1": gumbel(8, 0, 100, ids),
        "seed + 2**32": gumbel(7 + 2**32, 0, 100, ids),
        "position + 1": gumbel(7, 0, 101, ids),
        "sample + 1": gumbel(7, 1, 100, ids),
        "seed and position swapped": gumbel(100, 0, 7, ids),
        "seed + 1, position - 1": gumbel(8, 0, 99, ids),
        "sample and position moved": gumbel(7, 100, 0, ids),
        "token + 1": gumbel(7, 0, 100, ids + 1),
        "token + 2**16": gumbel(7, 0, 100, ids + 2**16),
        "token doubled": gumbel(7, 0, 100, 2 * ids + 1),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(len(ids)), name
    along = np.array([[gumbel(seed, 0, position, ids[:1])[0] for position in range(100)] for seed in range(100)])
    assert abs(np.corrcoef(along[:-1].ravel(), along[1:].ravel())[0, 1]) < 5 / math.sqrt(9900)
    assert abs(np.corrcoef(along[:, :-1].ravel(), along[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(9900)


def test_noise_of_a_token_does_not_depend_on_other_tokens() -> None:
    whole = gumbel(3, 2, 1, np.arange(100))
    assert gumbel(3, 2, 1, np.array([99, 5, 42])).tolist() == whole[[99, 5, 42]].tolist()


@pytest.mark.parametrize("hashed", [0, MASK, MASK - (1 << 11), 1 << 63])
def test_uniforms_lie_in_the_open_interval(hashed: int) -> None:
    """The hash is a bijection: the token ids whose hash is extreme can be computed, and their noise is finite."""

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits):
            result = value ^ (result >> bits)
        return result

    def unmix(value: int) -> int:
        value = (unshift(value, 31) * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
        value = (unshift(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
        return unshift(value, 30)

    key = (unmix(unmix(reference_hash(5, 0, 9, 0)))) & MASK
    token = ((unmix(unmix(hashed)) - key) * pow(GOLDEN, -1, 1 << 64)) & MASK
    assert reference_hash(5, 0, 9, token) == hashed
    assert np.isfinite(gumbel(5, 0, 9, np.array([token], dtype=np.uint64).view(np.int64))).all()


# ---- penalties and log-probabilities


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_penalties_follow_their_definition(dtype: torch.dtype) -> None:
    generator = random.Random(2)
    for _ in range(30):
        logits = torch.tensor([generator.gauss(0, 3) for _ in range(23)]).to(dtype)
        prompt = [generator.randrange(23) for _ in range(generator.randint(1, 9))]
        completion = [generator.randrange(23) for _ in range(generator.randint(0, 9))]
        params = SamplingParams(
            repetition_penalty=generator.choice([1.0, 1.3, 0.7]),
            presence_penalty=generator.choice([0.0, 0.6, -1.1]),
            frequency_penalty=generator.choice([0.0, 0.3, -0.7]),
        )
        expected = logits.double().tolist()
        for token in range(23):
            if token in prompt or token in completion:
                factor = params.repetition_penalty
                expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
            count = completion.count(token)
            expected[token] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
        before = logits.clone()
        penalised = penalise(logits, prompt, completion, params)
        assert penalised.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-14 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            penalised.double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=tolerance
        )
        assert torch.equal(logits, before), "the given logits are not changed"


def test_logprobs_are_the_log_softmax() -> None:
    expected = [value - math.log(sum(map(math.exp, LOGITS.tolist()))) for value in LOGITS.tolist()]
    assert logprobs_of(LOGITS, 5, 0) == {5: pytest.approx(expected[5], abs=1e-12)}
    assert logprobs_of(LOGITS, 5, 1) == {t: pytest.approx(expected[t], abs=1e-12) for t in (5, 2)}
    assert logprobs_of(LOGITS, 2, 1) == {2: pytest.approx(expected[2], abs=1e-12)}
    everything = logprobs_of(LOGITS, 3, 50)
    assert next(iter(everything)) == 3 and sorted(everything) == list(range(6))
    assert sum(map(math.exp, everything.values())) == pytest.approx(1, abs=1e-12)


# ---- parameters


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be in \[0, inf\), got -0.1"),
        ({"temperature": float("nan")}, r"temperature must be in \[0, inf\), got nan"),
        ({"temperature": float("inf")}, r"temperature must be in \[0, inf\), got inf"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \[0.01, 100\], got 0.0"),
        ({"presence_penalty": 101.0}, r"presence_penalty must be in \[-100, 100\], got 101.0"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty must be in \[-100, 100\], got nan"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
        ({"logprobs": 51}, r"logprobs must be in \[0, 50\], got 51"),
        ({"stop": ("ok", "")}, "stop must not hold an empty text"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value_and_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=f"^{message}"):
        SamplingParams(**values)


def test_parameters_at_their_bounds_are_taken() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, seed=2**63 - 1, logprobs=50)
    assert not SamplingParams().has_penalties
    for name in ("presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: -0.1}).has_penalties  # type: ignore[arg-type]
    assert SamplingParams(repetition_penalty=0.9).has_penalties


def test_the_repetition_penalty_forgets_old_tokens() -> None:
    """It counts the last tokens of prompt and completion together."""
    logits, params = torch.ones(9, dtype=torch.float64), SamplingParams(repetition_penalty=2.0)

    def penalised(prompt: list[int], completion: list[int]) -> list[int]:
        return (penalise(logits, prompt, completion, params) < 1).nonzero()[:, 0].tolist()

    assert penalised([1, 2], [3]) == [1, 2, 3]
    assert penalised([1, *[2] * (NUM_REPEATED - 1)], []) == [1, 2]
    assert penalised([1, *[2] * (NUM_REPEATED - 1)], [3]) == [2, 3]
    assert penalised([1, 2], [3] * (NUM_REPEATED - 1)) == [2, 3]
    assert penalised([1, 2], [4, *[3] * NUM_REPEATED]) == [3]
