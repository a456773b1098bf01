"""Linear with weights of 8 or 4 bits, as kernels/quantized.py packs them: y [M, N] = x [M, K] W [N, K]^T + bias.

A program takes BLOCK_M rows and BLOCK_N outputs, and unpacks a group of weights at a time (the bytes: kernels/cpu/linear_int.h).
Inputs are used in 16 bits, or rounded to 8 bits by groups: the products of a group are then exact integers. 8-bit numbers are
exact in bfloat16. Moves N K bytes (8 bits) or N K / 2 and the scales (4 bits) per BLOCK_M rows. Reference: `Quantized.reference`.
Source: Frantar et al. 2024 (Marlin, arXiv:2408.11743), for the order: unpack in registers, scale behind the product
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda import tuning
from pitlane.kernels.cuda.tuning import Form

PANEL = 16


@triton.jit
def quantize_kernel(x, numbers, scales, stride, K, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """A program rounds the group of a row: the largest value becomes 127. numbers int8 [M, GROUPS * GROUP], scales [M, GROUPS]."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)
    value = tl.load(x + row * stride + columns, columns < K, 0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    is_missing = tl.max((value != value).to(tl.int32), 0)  # tl.max leaves NaN out
    largest = tl.where(is_missing == 1, float("nan"), largest)
    factor = tl.where(largest > 1e-30, 127.0 / tl.maximum(largest, 1e-30), 0.0)
    scaled = value * factor
    low = tl.floor(scaled)
    rest = scaled - low
    is_odd = low - 2.0 * tl.floor(low / 2.0)
    whole = tl.where(rest > 0.5, low + 1.0, tl.where(rest < 0.5, low, low + is_odd))  # to nearest, ties to even
    whole = tl.where(is_missing == 1, 0.0, whole)  # the scale carries the NaN
    tl.store(numbers + row * GROUPS * GROUP + columns, whole.to(tl.int8))
    tl.store(scales + row * GROUPS + group, largest / 127.0)


@triton.jit
def int8_kernel(
    x, factors, packed, scales, bias, y, M, N, K, x_stride, panel_bytes,
    GROUPS: tl.constexpr, QUANTIZED: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K is the group of the inputs if they are QUANTIZED."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    panel = outs // 16 * panel_bytes + outs % 16 * 4
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(tl.cdiv(K, BLOCK_K)):
        ins = group * BLOCK_K + tl.arange(0, BLOCK_K)
        held = (ins < K)[:, None] & (outs < N)[None, :]
        byte = tl.load(packed + (panel[None, :] + (ins // 4 * 64 + ins % 4)[:, None]), held, 128)
        weight = byte.to(tl.int16) - 128
        at = rows[:, None] * x_stride + ins[None, :]
        value = tl.load(x + at, (rows < M)[:, None] & (ins < K)[None, :], 0)
        if QUANTIZED:
            whole = tl.dot(value, weight.to(tl.int8), out_dtype=tl.int32).to(tl.float32)
            factor = tl.load(factors + rows * GROUPS + group, rows < M, 0.0)
            total += whole * factor[:, None]
        else:
            total += tl.dot(value, weight.to(value.dtype), input_precision="ieee" if EXACT else "tf32")
    total *= tl.load(scales + outs, outs < N, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + outs, outs < N, 0.0)[None, :]
    tl.store(
        y + rows.to(tl.int64)[:, None] * N + outs[None, :],
        total.to(y.dtype.element_ty),
        (rows < M)[:, None] & (outs < N)[None, :],
    )


@triton.jit
def int4_kernel(
    x, factors, packed, bias, y, M, N, K, x_stride, panel_bytes, unit,
    GROUPS: tl.constexpr, QUANTIZED: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A panel holds pairs of groups: scales [2][16], without SYMMETRIC lows [2][16], then the nibbles of both groups."""
    HEAD: tl.constexpr = 64 if SYMMETRIC else 128
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    panel = outs // 16 * panel_bytes
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    inner = tl.arange(0, GROUP)
    for group in range(GROUPS):
        pair = panel + group // 2 * (HEAD + 16 * GROUP)
        line = pair + HEAD + group % 2 * (8 * GROUP) + outs % 16 * 4
        byte = tl.load(packed + (line[None, :] + (inner // 8 * 64 + inner % 4)[:, None]), (outs < N)[None, :], 0)
        number = ((byte >> ((inner % 8) // 4 * 4).to(tl.uint8)[:, None]) & 15).to(tl.int16)
        head = packed.to(tl.pointer_type(tl.float16)) + (pair + group % 2 * 32) // 2 + outs % 16
        scale = tl.load(head, outs < N, 0.0).to(tl.float32)
        ins = group * GROUP + inner
        at = rows[:, None] * x_stride + ins[None, :]
        value = tl.load(x + at, (rows < M)[:, None], 0)
        if SYMMETRIC:
            number -= 8
        if QUANTIZED:
            whole = tl.dot(value, number.to(tl.int8), out_dtype=tl.int32).to(tl.float32)
            factor = tl.load(factors + rows * GROUPS + group, rows < M, 0.0)
            part = whole * scale[None, :]
            if not SYMMETRIC:
                low = tl.load(head + 32, outs < N, 0.0).to(tl.float32)
                part += tl.sum(value.to(tl.int32), 1).to(tl.float32)[:, None] * low[None, :]
            total += part * factor[:, None]
        else:
            part = tl.dot(value, number.to(value.dtype), input_precision="ieee" if EXACT else "tf32")
            total += part * scale[None, :]
            if not SYMMETRIC:
                low = tl.load(head + 32, outs < N, 0.0).to(tl.float32)
                total += tl.sum(value.to(tl.float32), 1)[:, None] * low[None, :]
    total *= unit
    if HAS_BIAS:
        total += tl.load(bias + outs, outs < N, 0.0)[None, :]
    tl.store(
        y + rows.to(tl.int64)[:, None] * N + outs[None, :],
        total.to(y.dtype.element_ty),
        (rows < M)[:, None] & (outs < N)[None, :],
    )


def quantized_inputs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, G * size] and scales [M, G], as `kernels.packing.quantize_inputs`; zeros follow the last input."""
    rows, inputs = x.shape
    groups = triton.cdiv(inputs, size)
    numbers = torch.empty((rows, groups * size), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    quantize_kernel[(rows, groups)](x, numbers, scales, x.stride(0), inputs, GROUPS=groups, GROUP=size, num_warps=1)
    return numbers, scales


def linear(x: Tensor, weight: Any, dtype: torch.dtype | None = None, form: Form | None = None) -> Tensor:
    """x [M, K], weight: a `kernels.quantized.Quantized` on x's device -> y [M, N] in `dtype`; None: in x's dtype.

    form: of the launch, for tuning.
    """
    from pitlane.kernels.packing import UNIT

    rows, inputs = x.shape
    if inputs != weight.num_inputs or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be of 16 or 32 bits [M, {weight.num_inputs}], got {x.dtype} {list(x.shape)}")
    if rows * inputs >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 values, got {list(x.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    kind, outputs = weight.form, weight.num_outputs
    y = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    if not rows:
        return y
    size = kind.input_group if kind.bits == 4 or kind.quantized else 64
    values, factors = quantized_inputs(x, size) if kind.quantized else (x, x)
    form = form or tuning.chosen("int8" if kind.bits == 8 else f"int4 g{size}", rows, x.device)
    grid = triton.cdiv(rows, form.block_m), triton.cdiv(outputs, form.block_n)
    bias = x if weight.bias is None else weight.bias
    panel_bytes, groups = weight.packed.stride(0), triton.cdiv(inputs, size)
    shared: dict[str, Any] = {
        "GROUPS": groups,
        "QUANTIZED": kind.quantized,
        "HAS_BIAS": weight.bias is not None,
        "EXACT": x.dtype == torch.float32,
        "BLOCK_M": form.block_m,
        "BLOCK_N": form.block_n,
        **form.launch,
    }
    sizes = rows, outputs, inputs, values.stride(0), panel_bytes
    if kind.bits == 8:
        int8_kernel[grid](values, factors, weight.packed, weight.scales, bias, y, *sizes, BLOCK_K=size, **shared)
    else:
        symmetric = kind.symmetric
        int4_kernel[grid](
            values, factors, weight.packed, bias, y, *sizes, UNIT, SYMMETRIC=symmetric, GROUP=size, **shared
        )
    return y
