"""Move factors between a linear and the part before it. The model's function stays the same.

The columns of the linear are multiplied by factors s [K]. The outputs of the part before it, a norm or a linear, are divided by s.
Knows no model: names are keys. A recipe holds `NAME.columns` [K], `NAME.rows` [N] (divisors), `NAME.norm` [N] (the new weight of a
norm, offset included) and `NAME.clip` (`scale_search.clip_shares`) for the parts NAME that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pitlane.kernels.scale_search import clipped

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


class Feed(Protocol):
    """The part before a linear: its name, and its runs of channels with a common factor."""

    @property
    def name(self) -> str: ...

    @property
    def is_norm(self) -> bool: ...

    @property
    def groups(self) -> int: ...

    @property
    def repeats(self) -> int: ...


def recipe_tensors(
    feed: Feed, names: Sequence[str], factors: Tensor, weight: Callable[[str], Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a recipe that moves factors [K] from a feed to the linears `names`, and the factors in use.

    weight: returns the weight of a norm, with its offset. dtype: of the model.
    """
    tensors = {}
    if feed.is_norm:
        tensors[f"{feed.name}.norm"], factors = norm_factors(weight(feed.name), factors, dtype)
    else:
        tensors[f"{feed.name}.rows"] = row_divisors(factors, feed.groups, feed.repeats)
    return tensors | {f"{name}.columns": factors for name in names}, factors


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
