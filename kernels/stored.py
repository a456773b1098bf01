"""Linears from the numbers of a quantized checkpoint. The kernels for 4 and 8 bits serve the layouts that fit; the rest is dense.

A checkpoint has W = scale * (n - zero), n in [0, 2^bits). Scales of float16 and bfloat16 are kept exactly. A kernel for 4 bits
keeps the product scale * zero in float16: the product is off by at most 2^-12 of itself. Symmetric weights have no such product.
Shapes: N outputs, K inputs, G groups, M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pitlane.kernels.extension import unsupported
from pitlane.kernels.linear import Packed, fastest_products, packed_bytes
from pitlane.kernels.linear import unavailable as unavailable_linear
from pitlane.kernels.packing import GROUP_SIZES, UNIT, Format
from pitlane.kernels.quantize_math import Codes


class StoredWeight(NamedTuple):
    """The numbers of a weight. numbers: uint8 [N, K]. scales: [N, G]. zeros: [N, G]; None: 2^(bits - 1).

    groups: the group of every input [K]; None: the inputs lie in the order of their groups.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None


def kernel_form(bits: int, group_size: int, inputs: int, symmetric: bool, quantized: bool) -> Format | None:
    """The format of the kernel for a stored weight; None: no kernel serves it. A kernel's group may be part of a stored group."""
    if bits == 8:
        return Format(8, quantized) if symmetric and group_size == inputs else None
    sizes = [size for size in GROUP_SIZES if group_size % size == 0 and inputs % size == 0]
    return Format(4, quantized, max(sizes), symmetric) if bits == 4 and sizes else None


def codes_of(weights: Sequence[StoredWeight], form: Format) -> tuple[Codes, Tensor | None]:
    """The codes of the weights, joined along the outputs, and the order of the inputs [K] (None: unchanged).

    Only a single weight may have `groups`. Raises ValueError for scales that float16 cannot hold.
    """
    parts = [_codes(weight, form) for weight in weights]
    codes = [codes for codes, _ in parts]
    joined = Codes(
        torch.cat([part.codes for part in codes]),
        torch.cat([part.scales for part in codes]),
        None if form.symmetric else torch.cat([part.zeros for part in codes if part.zeros is not None]),
    )
    return joined, parts[0][1]


def _codes(weight: StoredWeight, form: Format) -> tuple[Codes, Tensor | None]:
    numbers, order = weight.numbers, None
    if weight.groups is not None:
        order = weight.groups.argsort(stable=True)
        numbers = numbers[:, order]
    inputs = numbers.shape[1]
    repeats = inputs // (form.group_size or inputs) // weight.scales.shape[1]
    scales = weight.scales.float().repeat_interleave(repeats, 1)
    if form.bits == 4 and not bool((scales / UNIT).half().isfinite().all()):
        raise ValueError("a scale is above 64, which the kernel for 4 bits cannot hold")
    if form.symmetric:
        middle = 2 ** (form.bits - 1)
        return Codes((numbers.to(torch.int16) - middle).to(torch.int8), scales), order
    assert weight.zeros is not None, "an asymmetric format needs zeros"
    return Codes(numbers, scales, weight.zeros.float().repeat_interleave(repeats, 1)), order


class Permuted:
    """A linear that permutes its inputs first: x [M, K] -> linear(x[:, order])."""

    def __init__(self, linear: Callable[[Tensor], Tensor], order: Tensor) -> None:
        self.linear, self.order = linear, order

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x.index_select(1, self.order))


class Dense:
    """A linear in torch, for dtypes and devices without a kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def is_packed(inputs: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel for bfloat16 serves a dense linear."""
    return inputs % 2 == 0 and unsupported(dtype, device) is None and unavailable_linear() is None


def dense_bytes(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of bytes of the weight in `dense_linear`."""
    return packed_bytes(outputs, inputs) if is_packed(inputs, dtype, device) else outputs * inputs * dtype.itemsize


def dense_linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> Packed | Dense:
    """A linear of a weight [N, K] in the model's dtype."""
    if is_packed(weight.shape[1], weight.dtype, device):
        return Packed(weight, bias, fastest_products())
    return Dense(weight.to(device), None if bias is None else bias.to(device))
