"""Integers of 1 to 8 bits in 32-bit words, without gaps. The first integer has the lowest bits; an integer may span two words."""

from __future__ import annotations

import torch
from torch import Tensor


def words_for(count: int, bits: int) -> int:
    """Number of 32-bit words for `count` integers."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, count]."""
    rows = len(words)
    wide = torch.nn.functional.pad(words, (0, words_for(-(-count // 32) * 32, bits) - words.shape[1]))
    wide = wide.view(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    numbers = torch.empty(rows, wide.shape[1], 32, dtype=torch.uint8)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        number = wide[..., word] >> shift
        if shift + bits > 32:
            number |= wide[..., word + 1] << (32 - shift)
        numbers[..., place] = (number & (2**bits - 1)).to(torch.uint8)
    return numbers.flatten(1)[:, :count]


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [R, count], all below 2^bits -> int32 [R, W]."""
    rows, count = numbers.shape
    wide = torch.nn.functional.pad(numbers, (0, -count % 32)).view(rows, -1, 32).to(torch.int64)
    words = torch.zeros(rows, wide.shape[1], bits, dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= wide[..., place] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= wide[..., place] >> (32 - shift)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.flatten(1)[:, : words_for(count, bits)].contiguous()
