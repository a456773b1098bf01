"""Layers against their formulas, and the builder: fused, member by member, dense, experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models import layers
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.config import RopeConfig
from pitlane.engine.models.layers import Concat, DenseLinear, dense_plan, rms_norm, silu_mul
from pitlane.engine.models.parts import LinearPart, LinearPlan, Member, NormPart, Part, Tensors
from pitlane.engine.models.presets import preset
from pitlane.engine.models.rope import Rope
from tests.engine.models.harness import CPU, Harness, load

FLOAT32 = BuildContext(preset("tiny"), torch.float32, CPU)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (520, 257)])
def test_dense_linear(dtype: torch.dtype, rows: int, with_bias: bool, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(rows, shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64) / 16
    bias = torch.randn(shape[0], dtype=torch.float64) if with_bias else None
    exact = torch.nn.functional.linear(x, weight, bias)
    with torch.inference_mode():
        linear = DenseLinear(weight.to(dtype), None if bias is None else bias.to(dtype))
        result = linear(x.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


def test_dense_linear_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "can_pack", lambda weight: False)
    weight, x = torch.randn(512, 512) / 16, torch.randn(3, 512)
    linear = DenseLinear(weight)
    assert not linear.packed
    torch.testing.assert_close(linear(x), x @ weight.T)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 96, dtype=torch.float64) * 8, torch.rand(96, dtype=torch.float64)
    exact = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    result = rms_norm(x.to(dtype), weight.to(dtype), 1e-5)
    torch.testing.assert_close(result.double(), exact, atol=TOLERANCE[dtype] * 2, rtol=TOLERANCE[dtype])


def test_silu_mul_leaves_its_input() -> None:
    gate_up = torch.randn(3, 10, dtype=torch.float64)
    before = gate_up.clone()
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before)


def test_rope_keeps_its_precision_far_out() -> None:
    """Only the distance counts: positions 100,000,003 and 100,000,000 give the score of 3 and 0, in float32."""
    rope = Rope(RopeConfig(500000.0), 64, torch.float32, CPU)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(query: int, key: int) -> Tensor:
        angles = [rope.angles(torch.tensor([position])) for position in (query, key)]
        return (rope.rotate(q, *angles[0]) * rope.rotate(k, *angles[1])).sum()

    torch.testing.assert_close(score(100_000_003, 100_000_000), score(3, 0), atol=2e-5, rtol=0)


class Plain:
    """A linear of a plugin, which the builder must put in its place."""

    def __init__(self, part: LinearPart, tensors: list[Tensors]) -> None:
        assert [member["weight"].shape for member in tensors] == [(out, part.in_features) for _, out in part.members]
        self.weight = torch.cat([member["weight"] for member in tensors]).float()

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_builder_asks_for_the_fused_linear_then_each_member() -> None:
    asked: list[list[str]] = []

    def only_keys(hook: str, part: Part) -> tuple[LinearPlan, Any] | None:
        if not isinstance(part, LinearPart):
            return None
        asked.append([member.name.rpartition(".")[2] for member in part.members])
        return (LinearPlan(7, 9, partial(Plain, part)), "a plugin") if asked[-1] == ["k_proj"] else None

    model = load("random:tiny", ask=only_keys)
    assert asked[:5] == [["lm_head"], ["q_proj", "k_proj", "v_proj"], ["q_proj"], ["k_proj"], ["v_proj"]]
    assert asked[5:7] == [["o_proj"], ["gate_proj", "up_proj"]]
    qkv = model.layers[0].qkv
    assert isinstance(qkv, Concat)
    assert [type(linear) for linear in qkv.linears] == [DenseLinear, Plain, DenseLinear]
    ids = list(range(20))
    torch.testing.assert_close(Harness(model).run({0: ids}), Harness(load("random:tiny")).run({0: ids}))


def test_builder_takes_a_fused_linear() -> None:
    def every(hook: str, part: Part) -> tuple[LinearPlan, Any] | None:
        return (LinearPlan(7, 9, partial(Plain, part)), "a plugin") if isinstance(part, LinearPart) else None

    model = load("random:tiny", ask=every)
    assert isinstance(model.layers[1].gate_up, Plain)
    ids = list(range(20))
    torch.testing.assert_close(Harness(model).run({0: ids}), Harness(load("random:tiny")).run({0: ids}))


def test_experts_take_rows_sorted_by_expert() -> None:
    plan = dense_plan(
        LinearPart(tuple(Member(f"e{i}", 3) for i in range(4)), 5, num_experts=4), FLOAT32, is_mapped=True
    )
    weights = [torch.randn(3, 5) for _ in range(4)]
    experts = plan.build([{"weight": weight} for weight in weights])
    x, offsets = torch.randn(7, 5), torch.tensor([0, 2, 2, 6, 7])  # the second expert has no row
    assert plan.num_bytes == 4 * 3 * 5 * 4
    expert_of = [0, 0, 2, 2, 2, 2, 3]
    exact = torch.stack([weights[expert] @ row for expert, row in zip(expert_of, x, strict=True)])
    torch.testing.assert_close(experts(x, offsets), exact)


def test_the_offset_of_a_norm_is_added_in_float32() -> None:
    """In bfloat16, 1 + 2^-9 would be 1."""
    plan = dense_plan(NormPart("norm", 2, 1.0), FLOAT32, is_mapped=True)
    stored = torch.tensor([2.0**-9, 0.5], dtype=torch.bfloat16)
    assert plan.build([{"weight": stored}]).tolist() == [1 + 2.0**-9, 1.5]


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros(47, 32)}, file)
    with pytest.raises(ModelError, match=r"up_proj\.weight must be \(48, 32\) by config\.json, got \(47, 32\)"):
        load(tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.mlp\.up_proj"):
        load(tmp_path)
