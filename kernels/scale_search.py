"""The searches of AWQ and SmoothQuant: factors for the columns of a linear, and ranges for its groups. In torch, without packing.

A factor s [K] multiplies the columns of a weight and divides the inputs: the linear's function stays the same until a rounding.
Shapes: N outputs, K inputs, G groups of S inputs. Errors as in quantize_math.py.
Papers: AWQ, https://arxiv.org/abs/2306.00978; SmoothQuant, https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pitlane.kernels.quantize_math import SHRINKS, InputStats, output_error

# Channels below this share of the largest channel count as this large: so scales can hold the factors.
SMALLEST = 1e-3
# Exponents that the search of AWQ tries. The search of SmoothQuant tries every second exponent.
POWERS = [i / 20 for i in range(21)]


class Search(NamedTuple):
    """The result of a search. scales: factors [K] of the columns. start, error: the error before and after. power: the exponent."""

    scales: Tensor
    start: float
    error: float
    power: float


def awq_scales(
    weight: Tensor,
    stats: InputStats,
    rounded: Callable[[Tensor], Tensor],
    shared: Callable[[Tensor], Tensor] = lambda x: x,
) -> Search:
    """Search the factors s [K] = rms(x)^power for the least error of W' = Q(W s) / s. Power 0 is round to nearest.

    rounded: rounds a weight [N, K] as the kernel will. shared: sets channels that must have the same factor to the same value.
    """
    assert stats.hessian is not None, "the search needs the Hessian"
    hessian = stats.hessian.to(weight.dtype)
    size = shared(stats.mean_square.to(weight.dtype)).sqrt()
    size = size.clamp(min=max(float(size.amax()) * SMALLEST, 1e-8))
    results = []
    for power in POWERS:
        factors = size**power
        factors = factors / (factors.amax() * factors.amin()).sqrt()
        error = float(output_error(rounded(weight * factors) / factors - weight, hessian).sum())
        results.append((error, power, factors))
    error, power, factors = min(results, key=lambda result: result[0])
    return Search(factors, results[0][0], error, power)


def clip_shares(
    weight: Tensor, hessian: Tensor, size: int, rounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Search how far to clip every group, as a share of its range, for the least error of the group's outputs.

    Returns the shares [N, G], and the errors [N] of the rows before and after. A row is clipped only if its error over all groups
    falls.
    """
    rows, inputs = weight.shape
    blocks = hessian.view(inputs // size, size, inputs // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    best = shares = None
    for share in SHRINKS:
        groups = (rounded(clipped(weight, share, size)) - weight).unflatten(1, (-1, size)).transpose(0, 1)
        error = ((groups @ blocks.to(groups)) * groups).sum(2).T  # [N, G]
        if best is None or shares is None:
            best, shares = error, torch.ones_like(error)
        shares = torch.where(error < best, share, shares)
        best = torch.minimum(error, best)
    assert shares is not None
    before = output_error(rounded(weight) - weight, hessian.to(weight.dtype))
    after = output_error(rounded(clipped(weight, shares, size)) - weight, hessian.to(weight.dtype))
    shares = torch.where((after < before)[:, None], shares, 1.0)
    return shares, before, torch.minimum(before, after)


def clipped(weight: Tensor, shares: Tensor | float, size: int) -> Tensor:
    """Clip every group of a weight to a share of the group's largest weight, on both sides of zero."""
    groups = weight.unflatten(1, (-1, size))
    lows, highs = groups.aminmax(dim=2)
    largest = torch.maximum(-lows, highs) * shares
    within: Tensor = groups.clamp(-largest[..., None], largest[..., None]).flatten(1)
    return within


def smooth_scales(
    weight: Tensor,
    stats: InputStats,
    rounded: Callable[[Tensor], Tensor],
    rounded_inputs: Callable[[Tensor], Tensor],
    shared: Callable[[Tensor], Tensor] = lambda x: x,
) -> Search:
    """Search the factors s [K] = absmax(x)^power / absmax(w)^(1 - power) for the least error of Q(X / s) Q(W s)^T.

    The search begins at s = 1. It measures the error of the outputs for the inputs `stats.sample`.
    """
    assert stats.sample is not None, "the search needs a sample of the inputs"
    sample = stats.sample.to(weight.dtype)
    exact = sample @ weight.T
    of_inputs = shared(stats.absmax.to(weight.dtype))
    of_inputs = of_inputs.clamp(min=max(float(of_inputs.amax()) * SMALLEST, 1e-8))
    of_weights = shared(weight.abs().amax(0))
    of_weights = of_weights.clamp(min=max(float(of_weights.amax()) * SMALLEST, 1e-8))
    results = []
    for power in [None, *POWERS[::2]]:
        factors = torch.ones_like(of_inputs) if power is None else of_inputs**power / of_weights ** (1 - power)
        factors = factors.clamp(1e-4, 1e4)
        error = float((rounded_inputs(sample / factors) @ rounded(weight * factors).T - exact).square().sum())
        results.append((error, power or 0.0, factors))
    error, power, factors = min(results, key=lambda result: result[0])
    return Search(factors, results[0][0], error, power)
