"""int8_simple: its error bound, its bytes, shapes that ATen's op does not take, tied tables, and what it moves in a real model."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane import BuildContext, EmbeddingPart, LinearPart, Member, SamplingParams, load_document
from pitlane.engine.models.presets import preset
from pitlane.engine.models.registry import resolve
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.plugins.int8_simple import Int8Simple
from tests.engine.models.harness import CPU, Harness, load

PLUGIN = Int8Simple()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def context(dtype: torch.dtype) -> BuildContext:
    return BuildContext(preset("tiny"), dtype, CPU)


def linear(dtype: torch.dtype, weights: list[Tensor], biases: list[Tensor] | None = None) -> Any:
    members = tuple(Member(f"m{i}", len(weight)) for i, weight in enumerate(weights))
    plan = PLUGIN.build_linear(LinearPart(members, weights[0].shape[1], bool(biases)), context(dtype))
    tensors = [{"weight": weight} for weight in weights]
    if biases:
        tensors = [{**member, "bias": bias} for member, bias in zip(tensors, biases, strict=True)]
    built = plan.build(tensors)
    parts = [built.values, built.scales, *([built.bias] if biases else [])]
    assert plan.num_bytes == sum(part.nbytes for part in parts), "the plan's bytes are exact"
    return built


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 8, 33, 96, 1040])  # ATen's op takes multiples of 16
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_the_matmul_of_rounded_weights(dtype: torch.dtype, width: int, with_bias: bool) -> None:
    torch.manual_seed(width)
    weights = [torch.randn(size, width) for size in (7, 1, 1500)]  # fused; at the largest width more than a chunk
    for weight in weights:
        weight[:, 0] = 1 + weight[:, 0].abs()  # float16 has few digits for the scale of a row of tiny weights
    biases = [torch.randn(len(weight)) for weight in weights] if with_bias else None
    built = linear(dtype, weights, biases)
    table = built.values.double() * built.scales.double()
    exact = torch.cat(weights).double()
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((table - exact).abs() <= 0.502 * step).all(), (
        "half a step; a scale in bfloat16 is off by up to 2^-8 of a step"
    )
    bias = torch.cat(biases).to(dtype).double() if biases else 0.0
    for rows in (0, 1, 5, 64, 65):
        x = torch.randn(2 * rows, width).to(dtype)[::2]  # not contiguous
        y = built(x)
        assert y.dtype == dtype and y.shape == (rows, 1508)
        largest = float((x.double() @ table.T).abs().max()) if rows else 1.0
        torch.testing.assert_close(
            y.double(), x.double() @ table.T + bias, atol=TOLERANCE[dtype] * (largest + 1), rtol=0
        )


def test_rows_of_zeros_stay_zeros() -> None:
    built = linear(torch.bfloat16, [torch.zeros(3, 32)])
    assert torch.equal(built(torch.randn(2, 32).bfloat16()), torch.zeros(2, 3, dtype=torch.bfloat16))


def test_a_tied_head_shares_the_table() -> None:
    weight = torch.randn(300, 48)
    plan = PLUGIN.build_embedding(EmbeddingPart("e", 300, 48, is_tied=True), context(torch.float32))
    built = plan.build([{"weight": weight}])
    assert plan.has_head and plan.num_bytes == 300 * 48 + 300 * 4
    ids = torch.tensor([299, 0, 7])
    torch.testing.assert_close(built(ids), weight[ids], atol=float(weight.abs().max()) / 127, rtol=0)
    x = torch.randn(2, 48)
    torch.testing.assert_close(built.linear(x), x @ built(torch.arange(300)).T)


@pytest.mark.parametrize("model", ["random:llama-1b-draft", "bundled"])  # a head of its own, and a tied head
def test_weights_take_half_and_the_engine_serves(make_engine: Any, model: str) -> None:
    engine = make_engine(model, dtype="bfloat16")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    core, small = (engine.generate("a b c", params, plan=engine.plan(plugins)) for plugins in ({}, {"int8_simple": {}}))
    assert 0.5 < small.stats["weight_bytes"] / core.stats["weight_bytes"] < 0.52
    assert (small.stats["exactness"], small.stats["batch_invariant"]) == ("approximate", False)
    assert len(small.token_ids) == 8 and small.stats["failed"] == {}


@pytest.mark.parametrize("chunk", [655, 32], ids=["prefill", "as ATen's op"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_probability_moves(dtype: torch.dtype, chunk: int) -> None:
    """The bound of the plugin's docstring and of docs/exactness.md."""
    source = resolve("bundled")
    sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
    ids = list(Tokenizer(source).render_raw("\n".join(page.text for page in sample.pages)).token_ids)
    assert len(ids) == 655
    build_context = BuildContext(source.config, dtype, CPU)
    exact = Harness(load("bundled"), 1, 1024).run({0: ids}).softmax(-1)
    harness = Harness(
        load("bundled", dtype, lambda hook, part: (getattr(PLUGIN, hook)(part, build_context), PLUGIN)), 1, 1024, dtype
    )
    logits = torch.cat([harness.run({0: ids[i : i + chunk]}) for i in range(0, len(ids), chunk)])
    rounded = logits.float().softmax(-1)
    moved = (exact - rounded).abs().sum(-1) / 2
    assert 0.01 < float(moved.mean()) < 0.05
    perplexity = [
        float(p[:-1].gather(1, torch.tensor(ids[1:])[:, None]).log().mean().neg().exp()) for p in (exact, rounded)
    ]
    assert perplexity[1] < 1.01 * perplexity[0]


def test_plans_without_tensors_follow_the_shape_alone() -> None:
    part = LinearPart((Member("q", 64), Member("k", 32)), 48, bias=True)
    plan = PLUGIN.build_linear(part, context(torch.bfloat16))
    assert plan.num_bytes == 96 * 48 + 96 * 2 + 96 * 2
    assert plan.num_bytes <= plan.peak_bytes
    float32 = PLUGIN.build_linear(replace(part, bias=False), context(torch.float32))
    assert float32.num_bytes == 96 * 48 + 96 * 4


def test_float16_holds_outputs_far_above_the_weights() -> None:
    built = linear(torch.float16, [torch.full((4, 1024), 0.1)])
    assert torch.allclose(built(torch.ones(2, 1024).half()).float(), torch.tensor(102.4), rtol=2e-2)
