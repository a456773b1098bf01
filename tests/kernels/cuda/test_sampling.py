"""Sampling in Triton draws the tokens that the host draws from the same logits."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pitlane import SamplingParams
from pitlane.engine.decode.sampling import noise_key
from pitlane.engine.decode.sampling import sample as sample_on_host
from pitlane.kernels.cuda.sampling import sample, sample_ref

SEED = 2**63 + 11


def same(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    keys = [noise_key(SEED, p.sample_index, position) for p, position in zip(params, positions, strict=True)]
    filters = ([p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params])
    wishes = (keys, [p.temperature for p in params], *filters)
    expected = [sample_on_host(row, p, SEED, at) for row, p, at in zip(logits, params, positions, strict=True)]
    assert sample(logits, *wishes).tolist() == expected
    assert sample_ref(logits, *wishes).tolist() == expected
    return expected


def random_params(generator: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=generator.choice([0.0, 0.1, 0.8, 1.0, 3.0]),
        top_k=generator.choice([0, 0, 1, 2, 40, 5000]),
        top_p=generator.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
        min_p=generator.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
        sample_index=generator.choice([0, 3]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 2100])
def test_tokens_are_those_of_the_host(vocabulary: int, dtype: torch.dtype) -> None:
    generator = random.Random(vocabulary)
    params = [random_params(generator) for _ in range(8)]
    logits = (4 * torch.randn(8, vocabulary + 3)).to(dtype)[:, :vocabulary]
    same(logits, params, [generator.randrange(10_000) for _ in params])


def test_filters_cut_where_the_host_cuts() -> None:
    """At a high temperature every survivor is likely, so a cut at another place changes tokens."""
    logits = torch.randn(1, 50).repeat(8, 1)
    for params in (
        SamplingParams(temperature=50.0, top_k=3),
        SamplingParams(temperature=50.0, top_p=0.1),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=50.0, top_k=10, top_p=0.5, min_p=0.9),
    ):
        drawn = same(logits, [params] * 8, list(range(8)))
        assert 1 < len(set(drawn)) <= 10


def test_equal_logits_at_a_cut_survive_in_the_order_of_their_ids() -> None:
    zeros = torch.full((8, 10), -0.0)
    zeros[:, 9] = 0.0
    assert set(same(zeros, [SamplingParams(temperature=1.0, top_k=5)] * 8, list(range(8)))) <= set(range(5))
    logits = torch.randint(0, 3, (8, 60)).float()
    for params in (SamplingParams(temperature=9.0, top_k=25), SamplingParams(temperature=9.0, top_p=0.4, top_k=50)):
        drawn = same(logits, [params] * 8, list(range(8)))
        assert len(set(drawn)) > 3


def test_forbidden_tokens_are_not_drawn() -> None:
    logits = torch.full((6, 40), float("-inf"))
    logits[:, 30], logits[:, 12] = 1.0, 1.5
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.99)) * 2
    ]
    assert set(same(logits, params, list(range(6)))) <= {12, 30}


def test_wrong_inputs_are_refused() -> None:
    wishes = ([0], [1.0], [0], [1.0], [0.0])
    with pytest.raises(ValueError, match="logits must be of 16 or 32 bits"):
        sample(torch.randn(1, 4, dtype=torch.float64), *wishes)
    with pytest.raises(ValueError, match=r"the lists must have 2 values, one for each row, got \[1, 1, 1, 1, 1\]"):
        sample(torch.randn(2, 4), *wishes)
    assert sample(torch.randn(0, 4), [], [], [], [], []).shape == (0,)
