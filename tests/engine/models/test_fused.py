"""The model calls fused operations in the place of plain operations, and gets the same bits from the same formulas."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pitlane import BuildContext, Plugin, PluginRegistry, SamplingParams, hookimpl

PROMPT = list(range(40))
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3)
CALLS: Counter[str] = Counter()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    CALLS["rms_norm"] += 1
    return torch.nn.functional.rms_norm(x, tuple(weight.shape), weight, eps)


def add_rms_norm(x: Tensor, out: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    CALLS["add_rms_norm"] += 1
    x = x + out
    return x, torch.nn.functional.rms_norm(x, tuple(weight.shape), weight, eps)


def rope_store(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    CALLS["rope_store"] += 1
    qk = torch.addcmul(qk * cos, torch.roll(qk, qk.shape[-1] // 2, -1), sin)
    keys.index_copy_(1, slots, qk[:, qk.shape[1] - keys.shape[0] :].transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return qk


class Fuses(Plugin):
    name, exactness = "fuses", "identical"
    kinds: ClassVar[dict[str, Any]] = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rope_store": rope_store}

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Any:
        return self.kinds.get(kind)


class Norms(Plugin):
    """Its norm doubles the output, so a model that passes it over writes other logits."""

    name, exactness = "a_norm", "steering"

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Any:
        return (lambda x, weight, eps: 2 * rms_norm(x, weight, eps)) if kind == "rms_norm" else None


@pytest.fixture
def registry() -> PluginRegistry:
    CALLS.clear()
    registry = PluginRegistry.load()
    registry.add(Fuses)
    registry.add(Norms)
    return registry


def test_the_tokens_are_the_same_and_all_operations_run(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry, plugins={})
    plain, plan = engine.generate(PROMPT, PARAMS), engine.plan({"fuses": {}})
    engine.lane_of(plan)
    CALLS.clear()  # an operation is tried when the lane opens
    fused = engine.generate(PROMPT, PARAMS, plan=plan)
    assert fused.token_ids == plain.token_ids
    assert fused.logprobs == plain.logprobs
    forwards, layers = CALLS["rms_norm"], engine.lane_of(engine.default_plan).built.model.num_layers
    assert forwards >= fused.stats["steps"]
    assert CALLS["add_rms_norm"] == 2 * layers * forwards and CALLS["rope_store"] == layers * forwards


def test_quantized_kv_is_written_by_its_store(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry, plugins={"kv_quant": {}})
    plain = engine.generate(PROMPT, PARAMS)
    fused = engine.generate(PROMPT, PARAMS, plan=engine.plan({"kv_quant": {}, "fuses": {}}))
    assert fused.token_ids == plain.token_ids and CALLS["rope_store"] == 0 and CALLS["add_rms_norm"] > 0


def test_a_norm_of_another_plugin_is_not_passed_over(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry, plugins={})
    engine.generate(PROMPT, PARAMS, plan=engine.plan({"a_norm": {}, "fuses": {}}))
    assert CALLS["add_rms_norm"] == 0 and CALLS["rope_store"] > 0 and CALLS["rms_norm"] > 0
