"""How a block of KV becomes bytes: int8 and int4 codes with scales and zero points, or fp8.

A block has 32 tokens. A row holds the bytes of one token, head and layer: first the codes, then a share of the parameters. So the
tensor of a store is `[2, L, Hkv, num_slots, B]`, and blocks are copied, saved and loaded as bytes.

int8 and int4 are asymmetric (KIVI, section 3): x = scale * code + zero, with codes in [0, 2^bits - 1]. A group of 32 values shares
scale and zero: the values of a channel in a block for keys, 32 channels of a token for values. zero is the smallest value of the
group, rounded down to bfloat16; scale is the range above zero / (2^bits - 1), rounded up to bfloat16. So no value is cut off, and
the error of a value is at most half a scale. Two codes of int4 share a byte: channel d in the low bits, channel d + D / 2 in the
high bits. The parameters of a block's keys are bfloat16 pairs (scale, zero); the 32 rows of the block hold D / 8 bytes of them.

fp8 is e4m3: a value is rounded to 4 significant bits, and cut off at 448. It has no parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

TOKENS = 32  # of a block
GROUP = 32  # channels of a value vector with one scale
LARGEST_FP8 = 448.0


class Format(Protocol):
    """num_bytes: of a row, the KV of one token, head and layer is two rows."""

    name: str
    num_bytes: int

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values [..., 32, D] of whole blocks -> rows [2, ..., 32, B] uint8."""

    def decode(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows [2, ..., 32, B] of whole blocks -> keys and values [..., 32, D]."""


def format_of(name: str, dim: int) -> Format:
    """Return the format `int8`, `int4` or `fp8` for heads of a size."""
    return Fp8(dim) if name == "fp8" else Affine(name, {"int8": 8, "int4": 4}[name], dim)


def row_bytes(name: str, dim: int) -> int:
    """Return the bytes of a row: dim * bits / 8 of codes, and dim / 8 of parameters (int8, int4; dim a multiple of 32)."""
    return format_of(name, dim).num_bytes


class Fp8:
    """e4m3, a byte per value."""

    name = "fp8"

    def __init__(self, dim: int) -> None:
        self.num_bytes = dim

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        x = torch.stack((keys, values)).float().clamp(-LARGEST_FP8, LARGEST_FP8)
        return x.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = rows.view(torch.float8_e4m3fn).to(dtype)
        return keys, values


class Affine:
    """Codes of 8 or 4 bits, with a scale and a zero point per group of values."""

    def __init__(self, name: str, bits: int, dim: int) -> None:
        self.name, self.bits, self.dim = name, bits, dim
        self.num_groups = dim // GROUP if dim % GROUP == 0 else 1
        self.num_codes = dim * bits // 8  # bytes
        self.num_bytes = self.num_codes + 4 * max(dim // TOKENS + (dim % TOKENS > 0), self.num_groups)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        shape, dim = (*keys.shape[:-1], self.num_bytes), self.dim
        rows = keys.new_zeros(2, *shape, dtype=torch.uint8)
        scales, zeros = self._parameters(keys, -2)
        rows[0, ..., : self.num_codes] = self._codes(keys, scales.unsqueeze(-2), zeros.unsqueeze(-2))
        packed = torch.stack((scales, zeros), -1).bfloat16().view(torch.uint8)  # [..., D, 4]
        share = dim * 4 // TOKENS
        rows[0, ..., self.num_codes : self.num_codes + share] = packed.reshape(*keys.shape[:-1], share)
        groups = values.unflatten(-1, (self.num_groups, -1))
        scales, zeros = self._parameters(groups, -1)
        codes = self._codes(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), values.shape)
        rows[1, ..., : self.num_codes] = codes
        packed = torch.stack((scales, zeros), -1).bfloat16().view(torch.uint8).flatten(-2)  # [..., 4 * groups]
        rows[1, ..., self.num_codes : self.num_codes + packed.shape[-1]] = packed
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        first, dim = self.num_codes, self.dim
        codes = rows[..., :first]
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), -1)
        share = dim * 4 // TOKENS
        packed = rows[0, ..., first : first + share].reshape(*rows.shape[1:-2], 4 * dim).contiguous()
        scales, zeros = packed.view(torch.bfloat16).unflatten(-1, (dim, 2)).float().unbind(-1)
        keys = torch.addcmul(zeros.unsqueeze(-2), codes[0].float(), scales.unsqueeze(-2))
        packed = rows[1, ..., first : first + 4 * self.num_groups].contiguous()
        scales, zeros = packed.view(torch.bfloat16).unflatten(-1, (self.num_groups, 2)).float().unbind(-1)
        groups = codes[1].float().unflatten(-1, (self.num_groups, -1))
        values = torch.addcmul(zeros.unsqueeze(-1), groups, scales.unsqueeze(-1)).flatten(-2)
        return keys.to(dtype), values.to(dtype)

    def _parameters(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points over an axis, in float32; every value is a bfloat16 too."""
        zeros = _down(x.amin(axis).float())
        return _up((x.amax(axis).float() - zeros) / (2**self.bits - 1)), zeros

    def _codes(self, x: Tensor, scales: Tensor, zeros: Tensor, shape: torch.Size | None = None) -> Tensor:
        codes = (x - zeros) / torch.where(scales == 0, 1.0, scales)
        codes = codes.round().clamp(0, 2**self.bits - 1).to(torch.uint8).view(shape or x.shape)
        if self.bits == 8:
            return codes
        low, high = codes.chunk(2, -1)
        return low | high << 4


def _down(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not larger than x, as float32."""
    bits = x.view(torch.int32)
    return torch.where(x < 0, bits + 0xFFFF, bits).bitwise_and(-0x10000).view(torch.float32)


def _up(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not smaller than x >= 0, as float32."""
    return (x.contiguous().view(torch.int32) + 0xFFFF).bitwise_and(-0x10000).view(torch.float32)
