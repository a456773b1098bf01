"""Norms and activations in Triton against references in float32. Triton's interpreter cuts bfloat16 off, it does not round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pitlane.kernels.cuda.activations import gelu_mul, silu_mul
from pitlane.kernels.cuda.norms import rms_norm
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
