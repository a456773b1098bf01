"""Factors that move between the inputs of a linear and the part that feeds it, so that the model's function stays.

Columns of the linear are multiplied by a factor s [K]; the outputs of the part before it, a norm or a linear, are divided by it.
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
    """The mean [K] over the channels that must have one factor: `groups` runs feed `repeats` runs each."""
    runs = x.view(groups, repeats, -1)
    return runs.mean(1, keepdim=True).expand_as(runs).reshape(-1)


def norm_factors(norm: Tensor, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The new weight of a norm for wanted factors, in the model's dtype, and the factors that it has exactly.

    norm: the weight, offset included. A rounded norm would change the model; so the factors take up the rounding.
    """
    before = norm.to(dtype).float()
    after = (before / factors).to(dtype).float()
    is_alive = (before != 0) & (after != 0)
    return torch.where(is_alive, after, before), torch.where(is_alive, before / after, 1.0)


def row_divisors(factors: Tensor, groups: int, repeats: int) -> Tensor:
    """The divisors of the rows of the linear that feeds channels with these factors [K]."""
    return factors.view(groups, repeats, -1)[:, 0].reshape(-1)


def scaled(name: str, tensors: Mapping[str, Tensor], get: Get, offset: float = 0.0) -> dict[str, Tensor] | None:
    """The tensors of a part with the factors of a recipe; None if it has none. offset: of a norm."""
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
