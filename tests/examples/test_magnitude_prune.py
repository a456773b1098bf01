"""The example that prunes: zeros are counted, shapes stay, and it composes with int8, which rounds the pruned weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane import Plugin, SamplingParams
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.kernels.packing import unpack_rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture
def registry() -> PluginRegistry:
    return PluginRegistry.load(EXAMPLES)


def model_of(engine: Any, plugins: dict[str, Any]) -> Any:
    return engine.lane_of(engine.plan(plugins)).built.model


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_the_smallest_weights_are_zero(make_engine: Any, registry: PluginRegistry, sparsity: float) -> None:
    engine = make_engine(registry=registry)
    core, pruned = (model_of(engine, plugins) for plugins in ({}, {"magnitude_prune": {"sparsity": sparsity}}))
    for name in ("qkv", "output", "gate_up", "down"):
        before, after = (getattr(model.layers[1], name).weight for model in (core, pruned))
        assert after.shape == before.shape
        zeros = after == 0
        assert (zeros.sum(1) == int(sparsity * after.shape[1])).all()
        assert torch.equal(after[~zeros], before[~zeros]), "all other weights stay"
        largest = before.abs().masked_fill(~zeros, 0).amax(1)
        assert (largest <= before.abs().masked_fill(zeros, torch.inf).amin(1)).all(), "the zeros were the smallest"
    assert torch.equal(pruned.norm, core.norm) and torch.equal(pruned.embedding.weight, core.embedding.weight)


def test_pruned_weights_are_then_rounded(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry, dtype="bfloat16")
    both = engine.plan({"int8": {}, "magnitude_prune": {"sparsity": 0.5}})
    linear = engine.lane_of(both).built.model.layers[0].down
    numbers = unpack_rows(linear.packed, linear.num_inputs)
    assert ((numbers == 0).sum(1) >= 128).all(), "half of the 256 inputs"
    result = engine.generate([1, 2, 3], PARAMS, plan=both)
    assert result.stats["exactness"] == "approximate" and result.stats["failed"] == {}
    alone = engine.generate([1, 2, 3], PARAMS, plan=engine.plan({"int8": {}}))
    assert alone.token_ids != result.token_ids
    assert alone.stats["weight_bytes"] == result.stats["weight_bytes"]


def test_it_is_as_short_as_it_claims(registry: PluginRegistry) -> None:
    plugin: type[Plugin] = registry.get("magnitude_prune")
    assert plugin.stage == 0 and plugin.exactness == "approximate"
    assert len((EXAMPLES / "magnitude_prune.py").read_text().splitlines()) <= 40
