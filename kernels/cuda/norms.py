"""RMS norm of rows, computed in float32: y = x / sqrt(mean(x^2) + eps) * w; alone, or behind the sum of the residual stream.

A program takes a row. `rms_norm` moves 2 T D elements in one pass, `add_rms_norm` 4 T D: the sum is rounded to x's dtype and
written, and the norm takes the rounded sum. x may be float32 where the weight, and so the norm, is bfloat16 or float16. References:
kernels/ops.py, `add_rms_norm_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.device import power_of_two
from pitlane.kernels.ops import rms_norm_ref


def add_rms_norm_ref(x: Tensor, out: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference: the sum in float32, rounded, and its norm."""
    total = (x.float() + out.float()).to(x.dtype)
    return total, rms_norm_ref(total, weight, eps)


@triton.jit
def rms_norm_kernel(
    x, out, weight, sums, y, stride, out_stride, eps,
    ADD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With ADD, `out` is added to x first, and the sum is stored."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    value = tl.load(x + row * stride + columns, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(out + row * out_stride + columns, inside, 0.0).to(tl.float32)
        rounded = value.to(sums.dtype.element_ty)
        tl.store(sums + row * DIM + columns, rounded, inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / DIM + eps)
    factor = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    tl.store(y + row * DIM + columns, (value * scale * factor).to(y.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> y [T, D], a new tensor in the weight's dtype."""
    return _normed(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, out: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, out [T, D], weight [D] -> x + out in x's dtype and its norm in the weight's dtype, new tensors [T, D]."""
    if x.shape != out.shape:
        raise ValueError(f"x and out must be alike in shape, got {list(x.shape)} and {list(out.shape)}")
    return _normed(x, out, weight, eps)


def _normed(x: Tensor, out: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
    if weight.shape != (dim,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{dim}], got {list(weight.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    second = x if out is None else out if out.stride(1) == 1 else out.contiguous()
    y = torch.empty((rows, dim), dtype=weight.dtype, device=x.device)
    sums = y if out is None else torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    if rows:
        block, add = power_of_two(dim), out is not None
        strides = x.stride(0), second.stride(0)
        warps = num_warps(block)
        rms_norm_kernel[(rows,)](x, second, weight, sums, y, *strides, eps, add, dim, block, num_warps=warps)
    return sums, y


def num_warps(block: int) -> int:
    """Warps for a program that holds `block` values: 256 values a warp, 1 to 16 warps."""
    return min(16, max(1, block // 256))
