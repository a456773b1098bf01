"""The residual stream and the logits are float32 where the weights are bfloat16 or float16; wider models do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane import BuildContext
from pitlane.engine import loader
from pitlane.engine.models import decoder
from pitlane.engine.models.layers import Ops, rms_norm, wide
from pitlane.kernels import linear
from pitlane.plugins.packed_linear import PackedLinear
from tests.engine.models.harness import CPU, Harness, load

WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
IDS = [(7 * i * i + 3 * i) % 500 for i in range(60)]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_norms_read_the_stream_and_write_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    seen = []

    def spy(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = rms_norm(x, weight, eps)
        seen.append((x.dtype, normed.dtype))
        return normed

    model = load("random:tiny", dtype)
    logits = Harness(model.with_ops(Ops(rms_norm=spy)), 1, 64, dtype).run({0: IDS[:20]})
    assert seen == [(WIDE[dtype], dtype)] * (2 * model.num_layers + 1)
    assert logits.dtype == WIDE[dtype]


def test_the_stream_keeps_a_branch_that_bfloat16_would_lose() -> None:
    x, out, weight = torch.full((1, 64), 256.0), torch.full((1, 64), 0.25).bfloat16(), torch.ones(64).bfloat16()
    assert (x.bfloat16() + out).unique().tolist() == [256.0]
    total, normed = Ops().add_norm(x, out, weight, 1e-5)
    assert total.unique().tolist() == [256.25] and normed.dtype == torch.bfloat16


def test_a_norm_of_float32_is_rounded_once() -> None:
    x, weight = torch.randn(5, 96) * 8, torch.rand(96).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    result = rms_norm(x, weight, 1e-5)
    assert result.dtype == torch.bfloat16
    assert bool(((result.double() - exact).abs() <= (2**-8 + 1e-5) * exact.abs()).all())


def test_linears_give_float32_where_they_can() -> None:
    class Both:
        def __call__(self, x: Tensor) -> Tensor:
            return x

        def wide(self, x: Tensor) -> Tensor:
            return x.float() + 1

    def only(x: Tensor) -> Tensor:
        return x

    half, full = torch.zeros(1).half(), torch.zeros(1)
    assert wide(Both(), half).tolist() == [1.0] and wide(only, half).dtype == torch.float16
    assert wide(Both(), full).tolist() == [0.0], "a linear of a float32 model has nothing to widen"


@pytest.mark.skipif(linear.unavailable() is not None, reason=str(linear.unavailable()))
def test_it_brings_bfloat16_nearer_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL divergence from float32 is at most 0.75 times the KL of a stream in bfloat16; 0.58 on an Intel Xeon."""
    plugin = PackedLinear()
    context = BuildContext(load("bundled").config, torch.bfloat16, CPU)

    def ask(hook: str, part: Any) -> Any:
        plan = plugin.build_linear(part, context) if hook == "build_linear" else None
        return None if plan is None else (plan, plugin)

    def logits() -> Tensor:
        return Harness(load("bundled", torch.bfloat16, ask), 1, 64, torch.bfloat16).run({0: IDS}).float()

    exact = Harness(load("bundled"), 1, 64).run({0: IDS}).log_softmax(-1)

    def divergence(table: Tensor) -> float:
        return float((exact.exp() * (exact - table.log_softmax(-1))).sum(-1).mean())

    result = logits()
    assert not torch.equal(result, result.bfloat16().float()), "the logits are not rounded"
    monkeypatch.setattr(decoder, "residual_dtype", lambda dtype: dtype)
    rounded = logits()
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert divergence(result) < 0.75 * divergence(rounded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saved_kv_of_another_stream_is_not_used(dtype: str, make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        engine = make_engine("random:tiny", dtype=dtype, plugins={})
        result: str = engine.lane_of(engine.default_plan).pool.fingerprint
        return result

    before = fingerprint()
    monkeypatch.setattr(loader, "residual_dtype", lambda dtype: dtype)
    assert (fingerprint() == before) == (dtype == "float32")
