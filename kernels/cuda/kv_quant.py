"""Quantizes blocks of 32 tokens of KV into rows, with the bits of plugins/kv_quant/formats.py; attention.py reads the rows.

A program takes 32 channels of a block and head, of keys or of values. int8 and int4: x = scale * code + zero, where the 32 values
of a channel in a block share a pair (keys), or 32 channels of a token (values). zero is the smallest value, rounded down to
bfloat16; scale is the range above zero / (2^bits - 1), rounded up. fp8: e4m3. Moves 64 D elements and 64 B
bytes per block and head.
Source: Liu et al. 2024 (KIVI)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.e4m3 import to_e4m3


@triton.jit
def pair_of(low, high, STEPS: tl.constexpr):
    """Scales and zeros as float32 whose lower 16 bits are 0: values of bfloat16."""
    bits = low.to(tl.int32, bitcast=True)
    bits = tl.where(low < 0, bits + 0xFFFF, bits) & -0x10000
    zero = bits.to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(high - zero, tl.zeros_like(high) + STEPS)
    scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    return scale, zero


@triton.jit
def codes_of(x, scale, zero, STEPS: tl.constexpr):
    """The codes, rounded to nearest, ties to even."""
    value = tl.math.div_rn(x - zero, tl.zeros_like(x) + tl.where(scale == 0, 1.0, scale))
    low = tl.floor(value)
    rest = value - low
    is_odd = low - 2.0 * tl.floor(low / 2.0)
    whole = tl.where(rest > 0.5, low + 1.0, tl.where(rest < 0.5, low, low + is_odd))
    return tl.minimum(tl.maximum(whole, 0.0), STEPS).to(tl.uint8)


@triton.jit
def upper_half(value):
    """The bits of values of bfloat16."""
    return ((value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF).to(tl.uint16)


@triton.jit
def group_of(
    full, pairs, group, part, STEPS: tl.constexpr, CODES: tl.constexpr, DIM: tl.constexpr, BYTES: tl.constexpr
):
    """Store the pairs of 32 channels of a block, and return their codes [32, 32]. part: 0 = keys, 1 = values."""
    token, inner = tl.arange(0, 32), tl.arange(0, 32)
    x = tl.load(full + token[:, None] * DIM + group * 32 + inner[None, :]).to(tl.float32)
    if part == 0:
        channel = group * 32 + inner
        scale, zero = pair_of(tl.min(x, 0), tl.max(x, 0), STEPS)
        at = (channel // (DIM // 32) * BYTES + CODES) // 2 + channel % (DIM // 32) * 2
        codes = codes_of(x, scale[None, :], zero[None, :], STEPS)
    else:
        scale, zero = pair_of(tl.min(x, 1), tl.max(x, 1), STEPS)
        at = (token * BYTES + CODES) // 2 + group * 2
        codes = codes_of(x, scale[:, None], zero[:, None], STEPS)
    tl.store(pairs + at, upper_half(scale))
    tl.store(pairs + at + 1, upper_half(zero))
    return codes


@triton.jit
def quantize_kernel(
    full, rows, sources, targets, full_part, full_head, row_part, row_head,
    BITS: tl.constexpr, DIM: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """full [2, Hkv, F * 32, D] with strides (full_part, full_head, D, 1); rows [2, Hkv, S, BYTES] likewise.

    The third axis of the grid: keys and values, times 32 channels (4 bits: 32 channels of each half).
    """
    CODES: tl.constexpr = DIM * BITS // 8
    GROUPS: tl.constexpr = DIM // 64 if BITS == 4 else DIM // 32
    index, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, group = tl.program_id(2) // GROUPS, tl.program_id(2) % GROUPS
    full += part.to(tl.int64) * full_part + head * full_head + tl.load(sources + index) * 32 * DIM
    rows += part.to(tl.int64) * row_part + head * row_head + tl.load(targets + index) * 32 * BYTES
    token, inner = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    if BITS == 0:
        x = tl.load(full + token * DIM + group * 32 + inner).to(tl.float32)
        codes = to_e4m3(tl.where(x != x, x, tl.minimum(tl.maximum(x, -448.0), 448.0)))
    else:
        pairs = rows.to(tl.pointer_type(tl.uint16))
        codes = group_of(full, pairs, group, part, 2.0**BITS - 1, CODES, DIM, BYTES)
        if BITS == 4:  # channel d + D / 2 shares the byte of channel d
            codes |= group_of(full, pairs, group + GROUPS, part, 2.0**BITS - 1, CODES, DIM, BYTES) << 4
    tl.store(rows + token * BYTES + group * 32 + inner, codes)


def quantize_blocks(full: Tensor, rows: Tensor, sources: Tensor, targets: Tensor, bits: int) -> None:
    """Quantize blocks `sources` [n] of full [2, Hkv, F * 32, D] into blocks `targets` [n] of rows [2, Hkv, S, B] uint8.

    bits: 8 or 4, or 0 for fp8. D is a multiple of 32 (4 bits: of 64).
    """
    (_, kv_heads, _, dim), width = full.shape, rows.shape[3]
    step = 64 if bits == 4 else 32
    if bits not in (0, 4, 8) or dim % step or width != (dim * bits // 8 + dim // 8 if bits else dim):
        raise ValueError(
            f"bits must be 8, 4 or 0, heads of a multiple of {step}, got {bits}, {dim} and rows of {width} bytes"
        )
    if rows.dtype != torch.uint8 or rows.shape[:2] != full.shape[:2] or sources.shape != targets.shape:
        raise ValueError(
            f"shapes do not fit: full {full.shape}, rows {rows.dtype} {rows.shape}, {sources.shape} blocks"
        )
    if full.stride()[2:] != (dim, 1) or rows.stride()[2:] != (width, 1):
        raise ValueError(f"slots of a head must follow each other, got strides {full.stride()}, {rows.stride()}")
    grid = len(sources), kv_heads, 2 * dim // step
    if len(sources):
        quantize_kernel[grid](
            full, rows, sources, targets, full.stride(0), full.stride(1), rows.stride(0), rows.stride(1),
            BITS=bits, DIM=dim, BYTES=width, num_warps=4,
        )  # fmt: skip


def supports(bits: int, dim: int) -> bool:
    """Whether `quantize_blocks` serves heads of this size."""
    return dim % (64 if bits == 4 else 32) == 0
