"""Linear with weights in float8 (e4m3): y [M, N] = x [M, K] W [N, K]^T + bias, with W = scale * e4m3.

A scale serves `group` inputs of an output. torch rounds to nearest, ties to even: 4 significant bits down to 2^-6, steps of 2^-9
below. A scale makes the largest weight 448, the largest number of e4m3. On a CPU, e4m3 is a storage format: a kernel in C widens
the bytes to bfloat16 in registers (AVX2, AVX-512), or to float32 (plain C). Without the kernel, torch computes.
Bytes moved: N K for the weights, once per 192 rows. A row's result has the same bits in any batch, in C. On CUDA, a Triton kernel
(cuda/linear_fp8.py) widens the bytes to x's dtype in registers, for a scale per tensor, per output and per 128 inputs of an output.
So x keeps its 16 bits on every device. Groups of other sizes are widened by torch.
Layout: linear_fp8.h; for Triton, the rows [N, K] and scales [N, G] as they are.
Source: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pitlane.kernels.cuda import device as triton
from pitlane.kernels.extension import MISSING, cpu
from pitlane.kernels.linear import checked_inputs

FLOAT8 = torch.float8_e4m3fn
LARGEST, PANEL = 448.0, 32
DTYPES = (torch.bfloat16, torch.float32)  # of the kernel
CHUNK = 2**20  # number of weights to round or widen at once
PLAIN, VECTORS = range(2)  # levels of the kernel
BLOCK = 128
GRANULARITIES = ("tensor", "channel", "block")


class Float8(NamedTuple):
    """A weight in float8. numbers: e4m3 [N, K]. scales: float32 [N, G]; a scale serves `group` inputs, the last scale the rest."""

    numbers: Tensor
    scales: Tensor
    group: int

    def widened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in float32."""
        inputs = self.numbers.shape[1]
        scales = self.scales.repeat_interleave(self.group, 1)[:, :inputs]
        return (self.numbers.float() * scales).to(dtype)


def to_float8(x: Tensor) -> Tensor:
    """Round to e4m3. Values beyond 448 become 448."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def quantize(weight: Tensor, granularity: str, scale_dtype: torch.dtype = torch.float32) -> Float8:
    """Round a weight [N, K]. A scale serves all weights (`tensor`), an output (`channel`), or 128 x 128 weights (`block`).

    scale_dtype: the scales are rounded to it before the weights are rounded.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be {', '.join(GRANULARITIES)}, got {granularity!r}")
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight is not finite; repair the checkpoint")
    rows, inputs = weight.shape
    group = BLOCK if granularity == "block" else inputs
    largest = torch.stack([part.abs().float().amax(1) for part in weight.split(group, 1)], 1)  # [N, G]
    if granularity == "tensor":
        largest = largest.amax().expand(rows, 1)
    elif granularity == "block":
        blocks = [part.amax(0).expand(len(part), -1) for part in largest.split(BLOCK)]
        largest = torch.cat(blocks)
    scales = (largest / LARGEST).to(scale_dtype).float().contiguous()
    numbers = torch.empty(rows, inputs, dtype=FLOAT8)
    step = max(1, CHUNK // inputs)
    for row in range(0, rows, step):
        factors = scales[row : row + step].where(scales[row : row + step] > 0, 1.0)
        wide = factors.repeat_interleave(group, 1)[:, :inputs]
        numbers[row : row + step] = to_float8(weight[row : row + step].float() / wide)
    return Float8(numbers, scales, group)


def num_bytes(outputs: int, inputs: int, group: int, device: torch.device | str = "cpu") -> int:
    """Number of bytes of a packed weight [outputs, inputs] and its scales."""
    rows = outputs if by_triton(inputs, group, device) else -(-outputs // PANEL) * PANEL
    return rows * (inputs + 4 * -(-inputs // group))


def by_triton(inputs: int, group: int, device: torch.device | str) -> bool:
    """Whether the kernel in Triton serves a weight with a scale per `group` inputs."""
    served = triton.serves(torch.device(device)) and triton.is_installed()
    return served and (group >= inputs or group == BLOCK)


class Fp8Linear:
    """A packed weight and its bias. Calling it with x [M, K] returns y [M, N] in x's dtype.

    parts: the weights to join along the outputs, with the same group. level: of the kernel in C; None: torch computes.
    """

    def __init__(
        self,
        parts: Sequence[Float8],
        bias: Tensor | None = None,
        level: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        numbers = torch.cat([part.numbers.view(torch.uint8) for part in parts])
        scales = torch.cat([part.scales.float() for part in parts])
        self.num_outputs, self.num_inputs = numbers.shape
        self.group, self.level = parts[0].group, level
        if bool((numbers & 0x7F).eq(0x7F).any()):
            raise ValueError("a weight is no number; repair the checkpoint")
        self.bias = None if bias is None else bias.to(device, torch.float32, copy=True).contiguous()
        self.by_triton = level is None and by_triton(self.num_inputs, self.group, device)
        self.packed = (numbers if self.by_triton else pack(numbers)).to(device)
        self.scales = (scales if self.by_triton else _by_panel(scales)).contiguous().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """As `__call__`, with y in float32. The kernel in C does not round the sums."""
        return self._product(x, torch.float32)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.level is None:
            return self._without_c(x).to(dtype)
        x = checked_inputs(x, self.num_inputs, DTYPES)
        y = x.new_empty(len(x), self.num_outputs, dtype=dtype)
        cpu.fp8_linear(
            x.data_ptr(),
            self.packed.data_ptr(),
            self.scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            len(x),
            self.num_outputs,
            self.num_inputs,
            self.group + self.group % 2,
            x.dtype == torch.float32,
            dtype == torch.float32,
            self.level if x.dtype == torch.bfloat16 else PLAIN,
            torch.get_num_threads(),
        )
        return y

    def _without_c(self, x: Tensor) -> Tensor:
        if not self.by_triton or x.dtype not in triton.DTYPES:
            return self.reference(x)
        from pitlane.kernels.cuda.linear_fp8 import linear

        return linear(x, self.packed.view(FLOAT8), self.scales, self.bias)

    def reference(self, x: Tensor) -> Tensor:
        """The same computation in torch, in float32 or float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = max(1, CHUNK // ((1 if self.by_triton else PANEL) * self.num_inputs))
        parts = [x.to(dtype) @ self._widened(panel, step).to(dtype).T for panel in range(0, len(self.packed), step)]
        y = torch.cat(parts, 1)[:, : self.num_outputs]
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _widened(self, panel: int, step: int) -> Tensor:
        """The weights of panels (for Triton: rows) [panel, panel + step) in float32."""
        if self.by_triton:
            rows = slice(panel, panel + step)
            return Float8(self.packed[rows].view(FLOAT8), self.scales[rows], self.group).widened()
        numbers = unpack(self.packed[panel : panel + step]).view(FLOAT8)[:, : self.num_inputs]
        scales = self.scales[panel : panel + step].transpose(1, 2).flatten(0, 1)
        return Float8(numbers, scales, self.group).widened()


def pack(numbers: Tensor) -> Tensor:
    """Bytes [N, K] -> packed [P, ceil(K / 2), 32, 2], zeros beyond N and K."""
    rows, inputs = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, inputs % 2, 0, -rows % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: bytes [32 P, K]."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


def _by_panel(scales: Tensor) -> Tensor:
    """Scales [N, G] -> [P, G, 32], zeros beyond N."""
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -len(scales) % PANEL))
    return padded.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def chosen_level(inputs: int, group: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The level of the kernel in C; None: torch computes."""
    if device.type != "cpu" or triton.interpreted() or dtype not in DTYPES or unavailable() is not None:
        return None
    if inputs % 2 or (group < inputs and group % 2):
        return None
    return VECTORS if dtype == torch.bfloat16 and cpu.has_fp8_vectors() else PLAIN


@cache
def unavailable() -> str | None:
    """The reason why the kernel in C cannot run, or None. Compares the kernel with the reference, once per process."""
    if cpu is None:
        return MISSING
    levels = [(torch.float32, PLAIN), (torch.bfloat16, PLAIN)]
    levels += [(torch.bfloat16, VECTORS)] if cpu.has_fp8_vectors() else []
    agrees = all(_agrees(dtype, level) for dtype, level in levels)
    return None if agrees else "its result differs from the reference on this machine; please report it"


def _agrees(dtype: torch.dtype, level: int) -> bool:
    """Whether kernel and reference agree on a small linear with an incomplete panel and an incomplete group."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(75, 300, generator=generator), "block")
    linear = Fp8Linear([weight], torch.randn(75, generator=generator), level)
    for rows in (1, 5, 9, 50):
        x = torch.randn(rows, 300, generator=generator).to(dtype)
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        if not torch.allclose(linear(x).float(), linear.reference(x).float(), rtol=rtol, atol=1e-3):
            return False
    return True
