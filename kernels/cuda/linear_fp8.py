"""Linear with fp8 weights (e4m3): y [M, N] = x [M, K] (W * scales)^T + bias.

Scales are float32: one per output, [N]; one per 128 inputs of an output, [N, ceil(K / 128)]; or one per block of 128 x 128 weights,
[ceil(N / 128), ceil(K / 128)]. Inputs are used in 16 bits, or rounded to e4m3 by rows (a scale per output) or by 128 inputs of a
row (other scales): the largest value becomes 448. e4m3 is exact in bfloat16 and float16, so the tensor cores of any GPU can
multiply it; from sm_89 on they multiply fp8 by fp8 directly. From sm_90 on, many rows run a kernel with
tensor descriptors (linear_fp8_tiles.py).
Moves N K bytes per BLOCK_M rows. References: `linear_ref`, `quantize_ref`.
Source: DeepSeek-AI 2024 (arXiv:2412.19437, section 3.3), for the scales of blocks and the sums in float32 after 128 inputs
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda import linear_fp8_tiles, tuning
from pitlane.kernels.cuda.device import interpreted
from pitlane.kernels.cuda.e4m3 import from_e4m3, to_e4m3
from pitlane.kernels.cuda.tuning import Form

BLOCK = 128  # outputs and inputs that share a scale
LARGEST = 448.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shared_by(scales: Tensor, outputs: int) -> int:
    """Outputs that share the scale of 128 inputs: 1 or 128. 0: an output has a scale for all inputs."""
    if scales.numel() == outputs and (scales.dim() == 1 or scales.shape[1] == 1):
        return 0
    return 1 if len(scales) == outputs else BLOCK


def scales_of(scales: Tensor, outputs: int, inputs: int) -> Tensor:
    """The scales of all weights, [N, K] float32."""
    shared = shared_by(scales, outputs)
    if not shared:
        return scales.float().reshape(outputs, 1).expand(outputs, inputs)
    wide = scales.float().repeat_interleave(shared, 0)[:outputs]
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
        size = BLOCK if shared_by(scales, len(weight)) else x.shape[1]
        numbers, factors = quantize_ref(x, size)
        value = numbers.float() * factors.repeat_interleave(size, 1)[:, : x.shape[1]]
    y = value @ (weight.float() * scales_of(scales, *weight.shape)).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


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
    SHARED: tl.constexpr, QUANTIZED: tl.constexpr, NATIVE: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SHARED: outputs that share the scale of 128 inputs, with a factor per 128 inputs; 0: a scale per output and a factor per row.

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
        if SHARED == 128:
            part *= tl.load(scales + tl.program_id(1) * BLOCK_N // 128 * scale_stride + start // 128)
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


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    quantized: bool = False,
    form: Form | None = None,
) -> Tensor:
    """x [M, K], weight float8_e4m3fn [N, K], scales [N], [N, 1], [N, ceil(K / 128)] or per block -> y [M, N] in x's dtype.

    quantized: round the inputs to e4m3. form: of the launch, for tuning. Rows of x and of weight may be strided.
    """
    (rows, inputs), (outputs, _) = x.shape, weight.shape
    shared = shared_by(scales, outputs)
    _check(x, weight, scales, bias, shared)
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows:
        return y
    values, factors = quantized_inputs(x, BLOCK if shared else inputs) if quantized else (x, scales)
    kernel = "fp8 W8A8" if quantized else "fp8 W8A16"
    if form is None:  # tiles of float32 are too large for descriptors
        form = tuning.plain(kernel, rows) if x.dtype == torch.float32 else tuning.chosen(kernel, rows, x.device)
    scale_stride = scales.stride(0) if shared else 0
    flags: dict[str, Any] = {
        "SHARED": shared,
        "QUANTIZED": quantized,
        "NATIVE": quantized and has_fp8(x.device),
        "HAS_BIAS": bias is not None,
    }
    given = values, factors, weight, scales, scales if bias is None else bias, y
    if form.descriptors and linear_fp8_tiles.serves(values, weight, y):
        linear_fp8_tiles.run(*given, scale_stride, form, flags)
        return y
    form = tuning.plain(kernel, rows) if form.descriptors else form
    grid = triton.cdiv(rows, form.block_m), triton.cdiv(outputs, form.block_n)
    fp8_kernel[grid](
        values, factors, weight.view(torch.uint8), *given[3:], rows, outputs, inputs, values.stride(0), weight.stride(0),
        scale_stride, factors.shape[-1], EXACT=x.dtype == torch.float32, **flags, **form.blocks, **form.launch,
    )  # fmt: skip
    return y


def _check(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, shared: int) -> None:
    (rows, inputs), (outputs, width) = x.shape, weight.shape
    if width != inputs or weight.dtype != torch.float8_e4m3fn or x.dtype not in DTYPES:
        given = f"{x.dtype} {list(x.shape)}, {weight.dtype} {list(weight.shape)}"
        raise ValueError(f"x must be of 16 or 32 bits [M, K], weight float8_e4m3fn [N, K], got {given}")
    if shared and scales.shape != (triton.cdiv(outputs, shared), triton.cdiv(inputs, BLOCK)):
        wanted = f"[{outputs}], or per {BLOCK} inputs of an output, or per {BLOCK} x {BLOCK} weights"
        raise ValueError(f"scales must be {wanted}, got {list(scales.shape)}")
    if scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous float32, got {scales.dtype} with strides {scales.stride()}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")
    if rows * x.stride(0) >= 2**31:
        raise ValueError(f"x must span fewer than 2^31 values, got {list(x.shape)} with strides {x.stride()}")


def has_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of a device multiply fp8 by fp8."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)
