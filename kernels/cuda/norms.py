"""RMS norm of rows, computed in float32: y = x / sqrt(mean(x^2) + eps) * w.

A program takes a row. Moves 2 T D elements in one pass. Reference: kernels/ops.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.device import power_of_two


@triton.jit
def rms_norm_kernel(x, weight, y, stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    value = tl.load(x + row * stride + columns, inside, 0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / DIM + eps)
    factor = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    tl.store(y + row * DIM + columns, (value * scale * factor).to(y.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> y [T, D], a new tensor in x's dtype."""
    rows, dim = x.shape
    if weight.shape != (dim,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{dim}], got {list(weight.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    if rows:
        block = power_of_two(dim)
        rms_norm_kernel[(rows,)](x, weight, y, x.stride(0), eps, dim, block, num_warps=num_warps(block))
    return y


def num_warps(block: int) -> int:
    """Warps for a program that holds `block` values: 256 values a warp, 1 to 16 warps."""
    return min(16, max(1, block // 256))
