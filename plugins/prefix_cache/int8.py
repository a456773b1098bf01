"""KV as int8: one scale per token, head and layer (the largest magnitude over 127), which halves it.

A tensor `x [..., D]` named n becomes `n.int8` [..., D], `n.scale` [..., 1] in float32, and `n.like`, empty and of x's dtype.
The error of a value is at most half its scale, 0.4 % of the largest in its vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors [..., D] as int8 with scales."""
    import torch

    packed = {}
    for name, tensor in tensors.items():
        scale = tensor.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        packed[f"{name}.int8"] = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
        packed[f"{name}.scale"] = scale
        packed[f"{name}.like"] = tensor.new_empty(0)
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, rounded. Raises KeyError for what `pack` did not make."""
    names = [name.removesuffix(".int8") for name in packed if name.endswith(".int8")]
    return {name: (packed[f"{name}.int8"] * packed[f"{name}.scale"]).to(packed[f"{name}.like"].dtype) for name in names}
