"""Norms and activations in Triton against references in float32. Triton's interpreter cuts bfloat16 off, it does not round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pitlane.kernels.cuda.activations import gelu_mul, silu_mul
from pitlane.kernels.cuda.norms import add_rms_norm, add_rms_norm_ref, rms_norm
from pitlane.kernels.cuda.rope import rope_store, rope_store_ref
from pitlane.kernels.ops import rms_norm_ref, silu_mul_ref

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
SHAPES = [(1, 1), (3, 74), (5, 576), (2, 1025), (0, 64)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def near(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype and result.shape == expected.shape
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.float(), expected.float(), rtol=tolerance, atol=tolerance / 16)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    near(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
    wide = torch.randn(shape[0], shape[1] + 7).to(dtype)[:, : shape[1]]  # rows with a stride
    near(rms_norm(wide, weight, 1e-5), rms_norm_ref(wide, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_a_residual_stream_in_float32(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The sum stays in float32, to the bit of torch's sum; the norm has the dtype of the weight."""
    x, weight = torch.randn(shape) * 300, torch.randn(shape[1]).to(dtype)
    near(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
    for out in (torch.randn(shape).to(dtype), torch.randn(shape)):
        total, normed = add_rms_norm(x, out, weight, 1e-5)
        assert total.dtype == torch.float32 and torch.equal(total, x + out)
        near(normed, add_rms_norm_ref(x, out, weight, 1e-5)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    wide = torch.randn(shape[0], shape[1] + 7).to(dtype)[:, : shape[1]]  # rows with a stride
    for pair in ((x, wide), (wide, x)):
        before = [tensor.clone() for tensor in pair]
        results, expected = add_rms_norm(*pair, weight, 1e-5), add_rms_norm_ref(*pair, weight, 1e-5)
        for result, reference in zip(results, expected, strict=True):
            near(result, reference)
        assert all(torch.equal(*tensors) for tensors in zip(pair, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 8), ((9, 3), 64), ((5, 1), 80), ((12, 2), 128)])
def test_rope_store(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """qk and v are views of one tensor. No slot of the store but the named slots changes."""
    queries, kv = heads
    for tokens in (1, 7):
        qkv = torch.randn(tokens, queries + 2 * kv, dim).to(dtype)
        qk, v = qkv[:, : queries + kv], qkv[:, queries + kv :]
        angles = torch.rand(tokens, 1, dim // 2).repeat(1, 1, 2) * 6
        cos, sin = (
            angles.cos().to(dtype),
            (angles.sin() * torch.tensor([-1.0, 1.0]).repeat_interleave(dim // 2)).to(dtype),
        )
        data = torch.randn(2, kv, 64, dim).to(dtype)
        slots, stores = torch.randperm(64)[:tokens], (data.clone(), data.clone())
        result = rope_store(qk, v, cos, sin, *stores[0], slots)
        near(result, rope_store_ref(qk, v, cos, sin, *stores[1], slots))
        near(stores[0], stores[1])
        kept = torch.ones(64, dtype=torch.bool).index_fill(0, slots, False)
        assert torch.equal(stores[0][:, :, kept], data[:, :, kept]) and torch.equal(
            stores[0][1][:, slots], v.transpose(0, 1)
        )


def test_rope_store_of_no_tokens() -> None:
    none = torch.empty(0, 3, 8)
    data = torch.ones(2, 1, 32, 8)
    assert (
        rope_store(none, none[:, :1], none[:, :1], none[:, :1], *data, torch.empty(0, dtype=torch.int64)).shape
        == none.shape
    )
    assert (data == 1).all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 74), (2, 3072), (0, 64)])
def test_gated_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    gate, up = x.float().chunk(2, -1)
    near(silu_mul(x), silu_mul_ref(x))
    near(gelu_mul(x), (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(dtype))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_up must be"):
        silu_mul(torch.randn(2, 3))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        rms_norm(torch.randn(2, 3), torch.randn(4), 1e-5)
    with pytest.raises(ValueError, match="x and out must be alike"):
        add_rms_norm(torch.randn(2, 3), torch.randn(2, 4), torch.randn(3), 1e-5)
    x, data = torch.randn(2, 3, 8), torch.randn(2, 1, 32, 8)
    with pytest.raises(ValueError, match="cos, sin and slots must be of 2 tokens"):
        rope_store(x, x[:, :1], x[:1, 0], x[:, 0], *data, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="shapes do not fit"):
        rope_store(x, x, x[:, 0], x[:, 0], *data, torch.tensor([0, 1]))
