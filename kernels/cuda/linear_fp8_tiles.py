"""Linear with fp8 weights for many rows on a GPU with tensor descriptors (sm_90 and later): the function of linear_fp8.py.

Descriptors load the tiles of x and of the weight into shared memory, without a thread that computes addresses, and store y. A
persistent grid: a program takes tile after tile; 8 tiles of rows follow each other for the same outputs, so that the weights stay
in the cache. With SPECIALISED, some warps of a program load and the others multiply. Sums are float32, in the order of
linear_fp8.py with tiles of BLOCK_K inputs. Shapes: as in linear_fp8.py. Source: Triton's tutorial of persistent matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pitlane.kernels.cuda.device import is_aligned, num_programs
from pitlane.kernels.cuda.e4m3 import from_e4m3
from pitlane.kernels.cuda.tuning import Form

GROUP = 8  # tiles of rows that follow each other


@triton.jit
def tiles_kernel(
    x, factors, weight, scales, bias, y, M, N, K, scale_stride, num_factors,
    SHARED: tl.constexpr, QUANTIZED: tl.constexpr, NATIVE: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """x, weight, y: descriptors with tiles [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K], [BLOCK_M, BLOCK_N]. SHARED: see fp8_kernel."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    width = GROUP * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first = tile // width * GROUP
        size = tl.minimum(tiles_m - first, GROUP)
        row = (first + tile % width % size) * BLOCK_M
        out = tile % width // size * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        outs = out + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALISED):
            value = x.load([row, start])
            byte = weight.load([out, start])
            if NATIVE:
                part = tl.dot(value, tl.trans(byte))
            elif QUANTIZED:
                part = tl.dot(from_e4m3(value), tl.trans(from_e4m3(byte)))
            else:
                wide = from_e4m3(byte).to(value.dtype)
                part = tl.dot(value, tl.trans(wide), input_precision="ieee" if EXACT else "tf32")
            if SHARED == 128:
                part *= tl.load(scales + out // 128 * scale_stride + start // 128)
            elif SHARED == 1:
                part *= tl.load(scales + outs * scale_stride + start // 128, outs < N, 0.0)[None, :]
            if SHARED:  # noqa: SIM102 (two constants)
                if QUANTIZED:
                    part *= tl.load(factors + rows * num_factors + start // 128, rows < M, 0.0)[:, None]
            total += part
        if not SHARED:
            total *= tl.load(scales + outs, outs < N, 0.0)[None, :]
            if QUANTIZED:
                total *= tl.load(factors + rows, rows < M, 0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + outs, outs < N, 0.0).to(tl.float32)[None, :]
        y.store([row, out], total.to(y.dtype))


def serves(values: Tensor, weight: Tensor, y: Tensor) -> bool:
    """Whether descriptors may describe the inputs (in 16 bits or bytes), the weight and the outputs."""
    return all(map(is_aligned, (values, weight, y)))


def run(
    values: Tensor,
    factors: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    y: Tensor,
    scale_stride: int,
    form: Form,
    flags: dict[str, Any],
) -> None:
    """Write y. values: x, or its bytes of e4m3 with `factors`. flags: SHARED, QUANTIZED, NATIVE and HAS_BIAS of the kernel."""
    (rows, inputs), outputs = values.shape, len(weight)
    if flags["NATIVE"]:
        values = values.view(torch.float8_e4m3fn)
    else:
        weight = weight.view(torch.uint8)
    described = (
        TensorDescriptor.from_tensor(values, [form.block_m, form.block_k]),
        TensorDescriptor.from_tensor(weight, [form.block_n, form.block_k]),
        TensorDescriptor.from_tensor(y, [form.block_m, form.block_n]),
    )
    num_tiles = triton.cdiv(rows, form.block_m) * triton.cdiv(outputs, form.block_n)
    tiles_kernel[(min(num_tiles, num_programs(y.device)),)](
        described[0], factors, described[1], scales, bias, described[2], rows, outputs, inputs, scale_stride,
        factors.shape[-1], EXACT=y.dtype == torch.float32, GROUP=GROUP, SPECIALISED=form.specialised,
        **flags, **form.blocks, **form.launch,
    )  # fmt: skip
