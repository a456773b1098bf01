"""Linear with fp8 weights (e4m3): y [M, N] = x [M, K] (W * scales)^T + bias.

Scales are float32: one per output, [N], or one per block of 128 x 128 weights, [ceil(N / 128), ceil(K / 128)]. Inputs are used in
16 bits, or rounded to e4m3 by rows (scales per output) or by 128 inputs of a row (scales per block): the largest value becomes 448.
e4m3 is exact in bfloat16 and float16, so the tensor cores of any GPU serve; a GPU from sm_89 on multiplies fp8 by fp8 itself.
Moves N K bytes per BLOCK_M rows. References: `linear_ref`, `quantize_ref`.
Source: DeepSeek-AI 2024 (arXiv:2412.19437, section 3.3), for the scales of blocks and the sums in float32 after 128 inputs
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.device import interpreted

BLOCK = 128  # outputs and inputs that share a scale
LARGEST = 448.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_blocks(scales: Tensor, outputs: int) -> bool:
    """Whether scales are of blocks, not of outputs."""
    return scales.numel() != outputs or (scales.dim() == 2 and scales.shape[1] != 1)


def scales_of(scales: Tensor, outputs: int, inputs: int) -> Tensor:
    """The scales of all weights, [N, K] float32."""
    if not has_blocks(scales, outputs):
        return scales.float().reshape(outputs, 1).expand(outputs, inputs)
    wide = scales.float().repeat_interleave(BLOCK, 0)[:outputs]
    return wide.repeat_interleave(BLOCK, 1)[:, :inputs]


def quantize_ref(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> e4m3 [M, K] and scales [M, ceil(K / size)] float32. size: inputs of a row that share a scale."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scales = groups.abs().amax(-1).clamp(min=1e-30) / LARGEST
    numbers = (groups / scales[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers.flatten(1)[:, : x.shape[1]], scales


def linear_ref(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, quantized: bool = False
) -> Tensor:
    """The reference in float32."""
    value = x.float()
    if quantized:
        size = BLOCK if has_blocks(scales, len(weight)) else x.shape[1]
        numbers, factors = quantize_ref(x, size)
        value = numbers.float() * factors.repeat_interleave(size, 1)[:, : x.shape[1]]
    y = value @ (weight.float() * scales_of(scales, *weight.shape)).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit
def from_e4m3(byte):
    """The values of e4m3 bytes in float16: its bits fit, with an exponent that is 8 too low."""
    sign = (byte.to(tl.uint16) & 0x80) << 8
    size = (byte.to(tl.uint16) & 0x7F) << 7
    value = (sign | size).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def to_e4m3(value):
    """The bytes of float32 values in [-448, 448], rounded to nearest, ties to even. NaN becomes 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    power = tl.maximum(size >> 23, 121)  # below 2^-6, steps are 2^-9
    # adding 2^(e + 20) to a value with exponent e leaves 3 bits behind the point, rounded as the sum is
    step = ((power + 20) << 23).to(tl.float32, bitcast=True)
    rounded = (size.to(tl.float32, bitcast=True) + step) - step
    normal = (rounded.to(tl.int32, bitcast=True) - (120 << 23)) >> 20
    is_small = rounded < 0.015625  # below 2^-6 the byte is a number of steps
    byte = tl.where(is_small, tl.where(is_small, rounded * 512.0, 0.0).to(tl.int32), normal)
    byte = tl.where(size > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    x, numbers, scales, stride, K, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program rounds SIZE inputs of a row. numbers: bytes of e4m3 [M, K]; scales [M, GROUPS]."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner = tl.arange(0, BLOCK)
    columns = group * SIZE + inner
    inside = (inner < SIZE) & (columns < K)
    value = tl.load(x + row * stride + columns, inside, 0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    missing = tl.max((value != value).to(tl.int32), 0)  # tl.max leaves NaN out
    scale = tl.math.div_rn(tl.maximum(largest, 1e-30), 448.0)
    scaled = tl.math.div_rn(value, tl.zeros_like(value) + scale)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    scaled = tl.where(missing == 1, float("nan"), scaled)
    tl.store(numbers + row * K + columns, to_e4m3(scaled), inside)
    tl.store(scales + row * GROUPS + group, scale)


@triton.jit
def fp8_kernel(
    x, factors, weight, scales, bias, y, M, N, K, x_stride, weight_stride, scale_stride, num_factors,
    BLOCKS: tl.constexpr, QUANTIZED: tl.constexpr, NATIVE: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCKS: scales [ceil(N / 128), ceil(K / 128)], and a factor per 128 inputs; else a scale per output and a factor per row.

    BLOCK_N and BLOCK_K divide 128. NATIVE: products of fp8 by fp8; else both are values of 16 bits.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lines = outs.to(tl.int64) * weight_stride
    for start in range(0, K, BLOCK_K):
        ins = start + tl.arange(0, BLOCK_K)
        byte = tl.load(weight + lines[None, :] + ins[:, None], (ins < K)[:, None] & (outs < N)[None, :], 0)
        value = tl.load(x + rows[:, None] * x_stride + ins[None, :], (rows < M)[:, None] & (ins < K)[None, :], 0)
        if NATIVE:
            part = tl.dot(value.to(tl.float8e4nv, bitcast=True), byte.to(tl.float8e4nv, bitcast=True))
        elif QUANTIZED:
            part = tl.dot(from_e4m3(value), from_e4m3(byte))
        else:
            part = tl.dot(value, from_e4m3(byte).to(value.dtype), input_precision="ieee" if EXACT else "tf32")
        if BLOCKS:
            part *= tl.load(scales + tl.program_id(1) * BLOCK_N // 128 * scale_stride + start // 128)
            if QUANTIZED:
                part *= tl.load(factors + rows * num_factors + start // 128, rows < M, 0.0)[:, None]
        total += part
    if not BLOCKS:
        total *= tl.load(scales + outs, outs < N, 0.0)[None, :]
        if QUANTIZED:
            total *= tl.load(factors + rows, rows < M, 0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + outs, outs < N, 0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + outs[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), (rows < M)[:, None] & (outs < N)[None, :])


def quantized_inputs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> bytes of e4m3 [M, K] uint8 and scales [M, ceil(K / size)] float32, as `quantize_ref`."""
    rows, inputs = x.shape
    groups = triton.cdiv(inputs, size)
    numbers = torch.empty((rows, inputs), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 256))
    quantize_kernel[(rows, groups)](x, numbers, scales, x.stride(0), inputs, groups, size, block, num_warps=warps)
    return numbers, scales


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, quantized: bool = False) -> Tensor:
    """x [M, K], weight float8_e4m3fn [N, K], scales [N], [N, 1] or [ceil(N / 128), ceil(K / 128)] -> y [M, N] in x's dtype.

    quantized: round the inputs to e4m3. Rows of x and of weight may be strided.
    """
    (rows, inputs), (outputs, width) = x.shape, weight.shape
    if width != inputs or weight.dtype != torch.float8_e4m3fn or x.dtype not in DTYPES:
        given = f"{x.dtype} {list(x.shape)}, {weight.dtype} {list(weight.shape)}"
        raise ValueError(f"x must be of 16 or 32 bits [M, K], weight float8_e4m3fn [N, K], got {given}")
    blocks = has_blocks(scales, outputs)
    if blocks and scales.shape != (triton.cdiv(outputs, BLOCK), triton.cdiv(inputs, BLOCK)):
        raise ValueError(f"scales must be [{outputs}] or a value per {BLOCK} x {BLOCK}, got {list(scales.shape)}")
    if scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous float32, got {scales.dtype} with strides {scales.stride()}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")
    if rows * x.stride(0) >= 2**31:
        raise ValueError(f"x must span fewer than 2^31 values, got {list(x.shape)} with strides {x.stride()}")
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows:
        return y
    values, factors = quantized_inputs(x, BLOCK if blocks else inputs) if quantized else (x, scales)
    block_m, block_n = tiles_of(rows)
    fp8_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))](
        values, factors, weight.view(torch.uint8), scales, scales if bias is None else bias, y, rows, outputs, inputs,
        values.stride(0), weight.stride(0), scales.stride(0) if blocks else 0, factors.shape[-1],
        BLOCKS=blocks, QUANTIZED=quantized, NATIVE=quantized and has_fp8(x.device), HAS_BIAS=bias is not None,
        EXACT=x.dtype == torch.float32, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K, **launch(rows),
    )  # fmt: skip
    return y


BLOCK_K = 64


def has_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of a device multiply fp8 by fp8."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)


def tiles_of(rows: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) for a number of rows. Not tuned on a GPU yet."""
    if rows <= 16:
        return 16, 64
    return 32 if rows <= 64 else 64, 64


def launch(rows: int) -> dict[str, Any]:
    """Warps and stages for a number of rows, so that the kernel spills no registers. Not tuned on a GPU yet."""
    return {"num_warps": 4 if rows <= 16 else 8, "num_stages": 3}
