"""KV as int8, in about half the space. Every token, head and layer has a scale: its largest magnitude / 127.

A tensor `x [..., D]` with name n becomes `n.int8` [..., D], `n.scale` [..., 1] in float32, and `n.like`, an empty tensor of x's
dtype. The error of a value is at most half a scale: 0.4 % of the largest magnitude in its vector. A tensor of integers, KV that a
store has quantized itself, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantise tensors [..., D] to int8 with scales."""
    import torch

    packed = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            packed[name] = tensor
            continue
        scale = tensor.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        packed[f"{name}.int8"] = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
        packed[f"{name}.scale"] = scale
        packed[f"{name}.like"] = tensor.new_empty(0)
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore the rounded input of `pack`. Raises KeyError if a scale or a dtype is missing."""
    kept = {name: tensor for name, tensor in packed.items() if not name.endswith((".int8", ".scale", ".like"))}
    names = [name.removesuffix(".int8") for name in packed if name.endswith(".int8")]
    return kept | {
        name: (packed[f"{name}.int8"] * packed[f"{name}.scale"]).to(packed[f"{name}.like"].dtype) for name in names
    }
