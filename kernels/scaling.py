"""Move factors between a linear and the part before it. The model's function stays the same.

The columns of the linear are multiplied by factors s [K]. The outputs of the part before it, a norm or a linear, are divided by s.
Knows no model: names are keys. A recipe holds `NAME.columns` [K], `NAME.rows` [N] (divisors), `NAME.norm` [N] (the new weight of a
norm, offset included) and `NAME.clip` (`quantize_math.clip_shares`) for the parts NAME that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pitlane.kernels.quantize_math import clipped

Get = Callable[[str], "Tensor | None"]


def shared(x: Tensor, groups: int, repeats: int) -> Tensor:
    """The mean [K] over the channels that must have the same factor. Each of `groups` runs of channels feeds `repeats` runs."""
    runs = x.view(groups, repeats, -1)
    return runs.mean(1, keepdim=True).expand_as(runs).reshape(-1)


def norm_factors(norm: Tensor, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the new weight of a norm, rounded to the model's dtype, and the factors that fit the rounded weight exactly.

    norm: the weight with its offset. factors: the wanted factors. Rounding the norm alone would change the model's function.
    """
    old = norm.to(dtype).float()
    new = (old / factors).to(dtype).float()
    is_divisible = (old != 0) & (new != 0)
    return torch.where(is_divisible, new, old), torch.where(is_divisible, old / new, 1.0)


def row_divisors(factors: Tensor, groups: int, repeats: int) -> Tensor:
    """The divisors of the rows of a linear. factors: of the channels [K] that the linear feeds."""
    return factors.view(groups, repeats, -1)[:, 0].reshape(-1)


def scaled(name: str, tensors: Mapping[str, Tensor], get: Get, offset: float = 0.0) -> dict[str, Tensor] | None:
    """Apply the factors of a recipe to the tensors of a part; None if the recipe has no factors for it. offset: of a norm."""
    norm = get(f"{name}.norm")
    if norm is not None:
        return {**tensors, "weight": norm - offset}
    columns, rows, clip = (get(f"{name}.{kind}") for kind in ("columns", "rows", "clip"))
    if columns is None and rows is None and clip is None:
        return None
    weight, changed = tensors["weight"].float(), dict(tensors)
    if columns is not None:
        weight = weight * columns
    if clip is not None:
        weight = clipped(weight, clip.float(), weight.shape[1] // clip.shape[1])
    if rows is not None:
        weight = weight / rows[:, None]
        if "bias" in tensors:
            changed["bias"] = tensors["bias"].float() / rows
    return {**changed, "weight": weight}
