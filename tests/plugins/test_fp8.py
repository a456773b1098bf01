"""fp8: its bound, its bytes, the head, toggles, and equal ids in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pitlane import SamplingParams
from pitlane.kernels import fp8
from pitlane.plugins.fp8 import Fp8
from tests.plugins.quality import Text


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


@pytest.mark.parametrize(
    "granularity", ["channel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor", "block"))]
)
def test_little_probability_moves(text: Text, granularity: str) -> None:
    """The bound of the docstring."""
    result = text.quality(text.logits(Fp8(Fp8.parse_options({"granularity": granularity})), torch.bfloat16, 256))
    assert 0.02 < result.moved < 0.12
    assert result.perplexity < 1.04 * result.exact_perplexity


@pytest.mark.parametrize("granularity", fp8.GRANULARITIES)
def test_weights_take_the_bytes_that_are_planned_and_toggle_per_request(make_engine: Any, granularity: str) -> None:
    engine, settings = make_engine(dtype="bfloat16"), {"fp8": {"granularity": granularity}}
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    core, small, again = (engine.generate("a b c", params, plan=engine.plan(plan)) for plan in ({}, settings, {}))
    assert small.stats["exactness"] == "approximate" and small.stats["failed"] == {}
    assert again.token_ids == core.token_ids
    model = engine.lane_of(engine.plan(settings)).built.model
    linears = [x for layer in model.layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)] + [model.head]
    assert {type(x) for x in linears} == {fp8.Fp8Linear}
    kept = sum(x.packed.nbytes + x.scales.nbytes for x in linears)
    others = 2 * (512 * 128 + 5 * 128)  # embedding and norms
    assert small.stats["weight_bytes"] in (kept + others, kept + others - 2 * 512 * 128)


def test_the_head_may_stay_as_it_is(make_engine: Any) -> None:
    engine = make_engine(dtype="bfloat16", plugins={"fp8": {"head": "bfloat16"}})
    engine.generate("a", SamplingParams(max_tokens=1))
    assert not isinstance(engine.lane_of(engine.default_plan).built.model.head, fp8.Fp8Linear)


@pytest.mark.skipif(fp8.unavailable() is not None, reason=str(fp8.unavailable()))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ids_do_not_depend_on_the_batch(make_engine: Any, dtype: str) -> None:
    plugins = {"fp8": {}, **({"flash_attention": {}, "fused_ops": {}} if dtype == "bfloat16" else {})}
    engine = make_engine(dtype=dtype, plugins=plugins)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[5, 9, 200, 41] * 3, [77, 8, 130] * 9, [1, 2, 3]]
    alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
    together = [stream.result().token_ids for stream in [engine.submit(prompt, params) for prompt in prompts]]
    assert alone == together
