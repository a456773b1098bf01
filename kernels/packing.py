"""How weights of 8 or 4 bits are rounded and packed, and how inputs are rounded. kernels/cpu/linear_int.h shows the layout.

8 bits: W = q * scale, with a scale per output and q in [-127, 127]. 4 bits: the inputs are cut into groups, and a group of an
output has n in [0, 15]: W = scale * (n - 8), or W = scale * n + low. Inputs may be rounded to 8 bits, with a scale per row and
group. All are rounded to nearest. Shapes: N outputs, K inputs, G groups, P panels of 16 outputs, M rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pitlane.kernels.quantize_math import UNIT as UNIT
from pitlane.kernels.quantize_math import Codes

PANEL = 16  # outputs
GROUP_SIZES = (32, 64, 128)
INPUT_GROUP = 64  # inputs that share a scale, with weights of 8 bits


class Format(NamedTuple):
    """How weights are stored, and how inputs are used. bits: 8 or 4. group_size, symmetric: of 4 bits. quantized: inputs too."""

    bits: int
    quantized: bool = True
    group_size: int = 0
    symmetric: bool = True

    def panel_bytes(self, num_inputs: int) -> int:
        """Bytes of 16 packed outputs, without the scales of 8 bits."""
        if self.bits == 8:
            return -(-num_inputs // 4) * 4 * PANEL
        groups = num_inputs // self.group_size
        return -(-groups // 2) * self.header_bytes + num_inputs * PANEL // 2

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Bytes of a packed weight [num_outputs, num_inputs] and its scales."""
        return -(-num_outputs // PANEL) * self.panel_bytes(num_inputs) + (self.bits == 8) * 4 * num_outputs

    @property
    def input_group(self) -> int:
        """Inputs of a row that share a scale, if they are rounded."""
        return self.group_size or INPUT_GROUP

    @property
    def header_bytes(self) -> int:
        """Bytes of the scales and lows of two groups of a panel."""
        return 64 if self.symmetric else 128


def group_refusal(option: str, size: int, linears: Mapping[str, int], otherwise: str) -> str | None:
    """Return a message if groups of `size` inputs do not divide the inputs of these linears (inputs by name), else None.

    option: the name of the group size, for the message. otherwise: advice if no size of GROUP_SIZES serves all linears.
    """
    for name, inputs in linears.items():
        if inputs % size:
            fitting = [str(n) for n in GROUP_SIZES if all(count % n == 0 for count in linears.values())]
            way = f"try {' or '.join(fitting)}" if fitting else otherwise
            return f"{option} must divide the inputs of every linear, got {size} and {inputs} ({name}); {way}"
    return None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, K] -> whole numbers in [-127, 127] as float32 [N, K], and scales [N]."""
    scales = weight.abs().amax(1) / 127
    return (weight / scales.where(scales > 0, 1.0)[:, None]).round_(), scales


def quantize_groups(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """float32 [N, K] -> whole numbers in [0, 15] [N, G, group_size], scales float16 [N, G], lows float16 [N, G] or None.

    symmetric: the number of largest size in a group becomes -8, whatever its sign. Else the range of a group becomes [0, 15].
    """
    groups = weight.unflatten(1, (-1, form.group_size)) / UNIT
    if form.symmetric:
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        scales, lows = (largest / -8).half(), None
        offset = -8 * scales.float()
    else:
        lowest, highest = groups.aminmax(dim=2)
        scales, lows = ((highest - lowest) / 15).half(), lowest.half()
        offset = lows.float()
    if not bool(scales.isfinite().all()) or (lows is not None and not bool(lows.isfinite().all())):
        raise ValueError("4 bits hold weights of up to 64; a weight is larger, or is no number; use 8 bits")
    wide = scales.float()
    numbers = (groups - offset[..., None]) / wide.where(wide != 0, 1.0)[..., None]
    return numbers.round_().clamp_(0, 15), scales, lows


def pack_rows(numbers: Tensor) -> Tensor:
    """Whole numbers [N, K], N a multiple of 16 -> bytes [N / 16, panel bytes]; zeros follow the last input."""
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 4))
    lines = (numbers + 128).to(torch.uint8).view(-1, PANEL, numbers.shape[1] // 4, 4)
    return lines.transpose(1, 2).flatten(1)


def pack_groups(numbers: Tensor, scales: Tensor, lows: Tensor | None) -> Tensor:
    """The results of `quantize_groups`, N a multiple of 16 -> bytes [N / 16, panel bytes]."""
    _, groups, size = numbers.shape
    eights = numbers.to(torch.uint8).view(-1, PANEL, groups, size // 8, 2, 4)
    nibbles = (eights[..., 0, :] | eights[..., 1, :] << 4).permute(0, 2, 3, 1, 4).flatten(2)  # [P, G, bytes of a group]
    headers = [x.view(-1, PANEL, groups).transpose(1, 2) for x in (scales, lows) if x is not None]
    header = torch.stack(headers, 2).contiguous().view(torch.uint8)  # [P, G, scales and lows, 32]
    whole = groups // 2 * 2
    pairs = [
        header[:, :whole].unflatten(1, (-1, 2)).transpose(2, 3).flatten(2),
        nibbles[:, :whole].unflatten(1, (-1, 2)).flatten(2),
    ]
    packed = [torch.cat(pairs, 2).flatten(1)]
    if groups > whole:
        packed += [torch.nn.functional.pad(header[:, -1], (0, 32)).flatten(1), nibbles[:, -1]]
    return torch.cat(packed, 1)


def pack_codes(codes: Codes, form: Format) -> tuple[Tensor, Tensor | None]:
    """Codes [N, K], N a multiple of 16, in their own scales -> bytes [N / 16, panel bytes], and the scales [N] of 8 bits."""
    if form.bits == 8:
        return pack_rows(codes.codes.float()), codes.scales[:, 0]
    numbers = codes.codes.unflatten(1, (-1, form.group_size))
    scales = (codes.scales / UNIT).half()
    if codes.zeros is None:
        return pack_groups(numbers + 8, scales, None), None
    return pack_groups(numbers, scales, (codes.scales * codes.zeros / -UNIT).half()), None


def unpack_rows(packed: Tensor, num_inputs: int) -> Tensor:
    """The inverse of `pack_rows`: bytes [P, panel bytes] -> whole numbers [16 P, K] as float32."""
    lines = packed.view(len(packed), -1, PANEL, 4).transpose(1, 2).reshape(len(packed) * PANEL, -1)
    return lines[:, :num_inputs].float() - 128


def unpack_groups(packed: Tensor, num_inputs: int, form: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack_groups`, in float32."""
    groups, size, head = num_inputs // form.group_size, form.group_size, form.header_bytes
    whole, body = groups // 2, groups // 2 * (head + PANEL * size)
    pairs = packed[:, :body].unflatten(1, (whole, -1)) if whole else packed.new_empty(len(packed), 0, head)
    kinds = head // 64
    headers, nibbles = [pairs[..., :head].reshape(len(packed), whole, kinds, 2, 32)], [pairs[..., head:].flatten(1)]
    if groups % 2:
        headers.append(packed[:, body : body + head].reshape(len(packed), 1, kinds, 2, 32))
        nibbles.append(packed[:, body + head :])
    header = torch.cat(headers, 1).contiguous().view(torch.float16).float()  # [P, pairs, scales and lows, 2, 16]
    table = header.permute(2, 0, 4, 1, 3).flatten(3)[..., :groups].reshape(-1, len(packed) * PANEL, groups)
    lines = torch.cat(nibbles, 1).view(len(packed), groups, size // 8, PANEL, 4).permute(0, 3, 1, 2, 4)
    numbers = torch.stack((lines & 15, lines >> 4), 4).reshape(-1, groups, size).float()
    return numbers, table[0], None if form.symmetric else table[1]


def quantize_inputs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> whole numbers in [-127, 127] as float32 [M, G, size] and scales [M, G]: the largest of a group becomes 127."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    largest = groups.abs().amax(2)
    factors = torch.where(
        largest > 1e-30, torch.full_like(largest, 127) / largest, 0 * largest
    )  # `127 / x` rounds twice
    return (groups * factors[..., None]).round_(), largest / 127


def product_ref(x: Tensor, packed: Tensor, num_inputs: int, form: Format, dtype: torch.dtype) -> Tensor:
    """x [M, K] times the numbers of packed panels [P, panel bytes], with 4 bits also their scales and lows -> [M, 16 P] in dtype.

    The caller applies the scales of the outputs (8 bits) or UNIT (4 bits). With rounded inputs, sums of a group are exact.
    """
    size = form.input_group
    scales: Tensor | None = None
    lows: Tensor | None = None
    if form.bits == 8:
        rows = unpack_rows(packed, num_inputs)
        numbers = torch.nn.functional.pad(rows, (0, -num_inputs % size)).unflatten(1, (-1, size)).to(dtype)
    else:
        whole, scales, lows = unpack_groups(packed, num_inputs, form)
        numbers, scales = (whole - 8 if lows is None else whole).to(dtype), scales.to(dtype)
        lows = None if lows is None else lows.to(dtype)
    if not form.quantized:
        weight = numbers if scales is None else numbers * scales[..., None]
        weight = weight if lows is None else weight + lows[..., None]
        product: Tensor = x.to(dtype) @ weight.flatten(1)[:, :num_inputs].T
        return product
    inputs, factors = (part.to(dtype) for part in quantize_inputs(x, size))
    y = inputs.new_zeros(len(x), len(numbers))
    for g in range(numbers.shape[1]):
        sums = inputs[:, g] @ numbers[:, g].T
        y += (sums if scales is None else sums * scales[:, g]) * factors[:, g, None]
        if lows is not None:
            y += (inputs[:, g].sum(1) * factors[:, g])[:, None] * lows[:, g]
    return y
