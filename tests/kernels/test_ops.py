"""C operations equal their references for any shape and extreme values, independently of other rows, and in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane.kernels import ops

here = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
BF16_STEP = 2.0**-8  # largest relative error of rounding to bfloat16


def made(*shape: int) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).bfloat16()


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 70, 512, 2048])
@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_rms_norm_is_within_a_rounding(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, weight = made(rows, dim).to(dtype), made(dim)
    if dtype == torch.float32:
        x *= 1 + 2**-10  # no bfloat16 holds these numbers
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    result = ops.rms_norm(x, weight, 1e-5)
    assert result.dtype == torch.bfloat16
    assert bool(((result.double() - exact).abs() <= (BF16_STEP + 1e-5) * exact.abs()).all())
    assert all(torch.equal(ops.rms_norm(x[i : i + 1], weight, 1e-5)[0], result[i]) for i in range(rows))


@here
@pytest.mark.parametrize("dim", [1, 16, 33, 5632])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_silu_mul_is_within_a_rounding(rows: int, dim: int) -> None:
    x = made(rows, 2 * dim)
    gate, up = x.double().chunk(2, -1)
    result, exact = ops.silu_mul(x), gate * torch.sigmoid(gate) * up
    assert bool(((result.double() - exact).abs() <= (BF16_STEP + 1e-5) * exact.abs()).all())
    assert all(torch.equal(ops.silu_mul(x[i : i + 1])[0], result[i]) for i in range(rows))


@here
def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([-3e38, -200.0, -90.0, -0.0, 0.0, 90.0, 3e38, float("inf")]).bfloat16()
    result = ops.silu_mul(torch.cat([gate, torch.ones(8).bfloat16()])[None])[0]
    assert result[:5].abs().max() < 1e-30 and torch.equal(result[5:], gate[5:])


@here
def test_takes_strided_rows() -> None:
    x, weight = made(4, 96), made(32)
    assert torch.equal(ops.rms_norm(x[:, 32:64], weight, 1e-5), ops.rms_norm(x[:, 32:64].clone(), weight, 1e-5))
    assert torch.equal(ops.silu_mul(x[:, 16:80]), ops.silu_mul(x[:, 16:80].clone()))


@here
def test_rms_norm_refuses_other_dtypes() -> None:
    for x, weight in ((made(2, 8).half(), made(8)), (made(2, 8).float(), made(8).float())):
        with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
            ops.rms_norm(x, weight, 1e-5)


@here
def test_lanes_of_one_variant_share_weights_and_differ_in_operations(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=["packed_linear"])
    plain = engine.lane_of(engine.default_plan)
    fused = engine.lane_of(engine.plan({"packed_linear": {}, "fused_ops": {}}))
    assert fused is not plain and fused.built.variant is plain.built.variant
    assert fused.runner.forward.model.layers is plain.runner.forward.model.layers
    assert fused.runner.forward.model.ops.rms_norm is ops.rms_norm is not plain.runner.forward.model.ops.rms_norm
