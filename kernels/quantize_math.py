"""Quantize the weight of a linear: round to nearest, and GPTQ. In torch, without packing. The searches are in scale_search.py.

Symmetric codes mean W = scale * code, with int8 codes in [-2^(b-1), 2^(b-1) - 1]. The weight of largest size in a group becomes the
lowest code, so a scale may be negative. With 8 bits, codes are in [-127, 127] and scales are positive. Asymmetric codes mean
W = scale * (code - zero), with uint8 codes in [0, 2^b - 1] and an integer zero. `group_size` 0: a row is a group.
Scales have 11 significant bits, as in float16 (`UNIT`), so packed weights keep them exactly.
Shapes: N outputs, K inputs, G groups of S inputs. The error is sum (D H) D with D = W' - W and H = X^T X: the squared error of
all outputs over the calibration tokens.
Paper: GPTQ, https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2.0**-10  # float16 holds scales and lows in this unit: values up to 64, and small values down to 1e-6
METHODS = ("rtn", "gptq")
BLOCK = 128  # columns that GPTQ updates together
# From this number of inputs, the Cholesky factors of GPTQ are float32: in float64 they take 1.5 GB at 8192 inputs.
WIDE = 4096
SHRINKS = [1 - 0.05 * i for i in range(11)]  # shares of a group's range that the search for clipping tries


class InputStats(NamedTuple):
    """The inputs X [T, K] of a linear over the calibration tokens.

    absmax: largest |x| per channel [K]. mean_square: mean x^2 per channel [K]. hessian: X^T X [K, K], or None. sample: some rows of
    X [R, K], or None.
    """

    num_tokens: int
    absmax: Tensor
    mean_square: Tensor
    hessian: Tensor | None = None
    sample: Tensor | None = None


class Codes(NamedTuple):
    """A quantized weight. codes: [N, K]. scales: float32 [N, G]. zeros: float32 [N, G], or None if symmetric.

    order: the permutation [K] of the inputs, if codes and groups have another order than the inputs. All methods here return None:
    GPTQ with `act_order` keeps the original groups.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weight [N, K] in float32."""
        groups = self.codes.unflatten(1, (self.scales.shape[1], -1)).float()
        groups = groups if self.zeros is None else groups - self.zeros[..., None]
        weight: Tensor = (groups * self.scales[..., None]).flatten(1)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def rows(self, begin: int, end: int) -> Codes:
        """Rows `[begin, end)`."""
        parts = (
            self.codes[begin:end],
            self.scales[begin:end],
            self.zeros if self.zeros is None else self.zeros[begin:end],
        )
        return Codes(*parts, self.order)


def quantize_linear(
    weight: Tensor,
    bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    method: str = "rtn",
    stats: InputStats | None = None,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    clip: bool = False,
) -> Codes:
    """Quantize a weight [N, K].

    bits: 2 to 8. stats: needed by `gptq`, and by `clip`. act_order, damping: of GPTQ. clip: search the range of every group for
    the least squared error, weighted by the mean square of the inputs. Raises ValueError; the message says what to do.
    """
    rows, inputs = weight.shape
    size = group_size or inputs
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if inputs % size:
        raise ValueError(f"group_size must divide the inputs, got {group_size} and {inputs}; 0 makes a row a group")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight is not finite; repair the checkpoint")
    if (method == "gptq" or clip) and stats is None:
        raise ValueError(f"{method if method == 'gptq' else 'clip'} needs the statistics of the inputs; pass `stats`")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    grid = Grid(bits, size, symmetric, stats.mean_square if clip and stats is not None else None)
    if method == "gptq":
        assert stats is not None
        if stats.hessian is None:
            raise ValueError("gptq needs the Hessian of the inputs; collect it with the statistics")
        return gptq(weight, grid, stats.hessian, act_order, damping)
    scales, zeros = grid.fitted(weight.unflatten(1, (-1, size)))
    codes = grid.rounded(
        weight.unflatten(1, (-1, size)), scales[..., None], zeros if zeros is None else zeros[..., None]
    )
    return grid.codes(codes.flatten(1), scales, zeros)


def joined(pieces: list[Codes]) -> Codes:
    """Join the codes of several weights with the same inputs along the outputs."""
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    codes, scales = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces])
    return Codes(codes, scales, torch.cat(zeros) if zeros else None)


class Grid(NamedTuple):
    """The grid on which a weight is rounded. size: inputs of a group. symmetric: zero is the middle of the grid.

    importance: factors [K] of the squared errors in the search for a group's range. None: no search, the range covers all weights.
    """

    bits: int
    size: int
    symmetric: bool
    importance: Tensor | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 2 ** (self.bits - 1)
        if not self.symmetric:
            return 0, 2 * half - 1
        return (-127, 127) if self.bits == 8 else (-half, half - 1)

    def fitted(self, groups: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zeros [N, G] of groups [N, G, S]. first: the index of the first input."""
        best_scales, best_zeros = self._for_range(groups, 1.0)
        if self.importance is None:
            return best_scales, best_zeros
        importance = self.importance[first : first + groups.shape[1] * self.size].view(-1, self.size).to(groups)
        best = self._error(groups, best_scales, best_zeros, importance)
        for share in SHRINKS[1:]:
            scales, zeros = self._for_range(groups, share)
            error = self._error(groups, scales, zeros, importance)
            is_better = error < best
            best = torch.where(is_better, error, best)
            best_scales = torch.where(is_better, scales, best_scales)
            if zeros is not None and best_zeros is not None:
                best_zeros = torch.where(is_better, zeros, best_zeros)
        return best_scales, best_zeros

    def _for_range(self, groups: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
        low, high = self.limits
        if self.symmetric and self.bits == 8:
            return significant(groups.abs().amax(2) * (share / high)), None
        if self.symmetric:
            largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
            return significant(largest * (share / low)), None
        lowest, highest = groups.amin(2).clamp(max=0) * share, groups.amax(2).clamp(min=0) * share
        scales = significant((highest - lowest) / high)
        zeros = (-lowest / scales.where(scales != 0, 1.0)).round().clamp(low, high)
        return scales, zeros

    def _error(self, groups: Tensor, scales: Tensor, zeros: Tensor | None, importance: Tensor) -> Tensor:
        offsets = None if zeros is None else zeros[..., None]
        codes = self.rounded(groups, scales[..., None], offsets)
        return ((values(codes, scales[..., None], offsets) - groups).square() * importance).sum(2)

    def rounded(self, weights: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The codes of weights, in a floating dtype. scales, zeros: broadcast to the weights."""
        numbers = (weights / scales.where(scales != 0, 1.0)).round()
        return (numbers if zeros is None else numbers + zeros).clamp(*self.limits)

    def codes(self, numbers: Tensor, scales: Tensor, zeros: Tensor | None) -> Codes:
        dtype = torch.int8 if self.symmetric else torch.uint8
        return Codes(numbers.to(dtype), scales.float(), None if zeros is None else zeros.float())


def values(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weights of codes."""
    return (codes if zeros is None else codes - zeros) * scales


def significant(scales: Tensor) -> Tensor:
    """Round scales to 11 significant bits, as packed weights store them."""
    rounded = (scales.float() / UNIT).half().float() * UNIT
    if not bool(rounded.isfinite().all()):
        raise ValueError("scales hold weights of up to 64 per code; a weight is larger")
    return rounded.to(scales.dtype)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The squared error [N] of every output for a difference of weights [N, K]: d H d^T."""
    return ((difference @ hessian) * difference).sum(1)


def gptq(weight: Tensor, grid: Grid, hessian: Tensor, act_order: bool, damping: float) -> Codes:
    """Round column by column. After every column, adjust the columns not rounded yet to make up for its error.

    act_order: round the columns of large inputs first. The scales then fit the original weights, in the original groups. Without
    act_order, the scales of a group fit its adjusted weights. damping: share of the mean of H's diagonal to add to the diagonal.
    """
    inputs = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(inputs)
    upper = inverse_factor(hessian, order, damping).to(weight.dtype)
    scales, zeros = grid.fitted(weight.unflatten(1, (-1, grid.size)))
    left = weight[:, order].clone()
    numbers = torch.empty_like(left)
    step = grid.size if not act_order and grid.size < inputs else BLOCK
    for begin in range(0, inputs, step):
        end = min(begin + step, inputs)
        if not act_order and grid.size < inputs:
            group = begin // grid.size
            scale, zero = grid.fitted(left[:, None, begin:end], begin)
            scales[:, group] = scale[:, 0]
            if zeros is not None and zero is not None:
                zeros[:, group] = zero[:, 0]
        errors = torch.empty_like(left[:, begin:end])
        for i in range(begin, end):
            group = int(order[i]) // grid.size
            offset = None if zeros is None else zeros[:, group]
            numbers[:, i] = grid.rounded(left[:, i], scales[:, group], offset)
            error = (left[:, i] - values(numbers[:, i], scales[:, group], offset)) / upper[i, i]
            left[:, i:end].addr_(error, upper[i, i:end], alpha=-1)
            errors[:, i - begin] = error
        left[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    return grid.codes(numbers[:, order.argsort()], scales, zeros)


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian. order: of the inputs."""
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian is not finite; calibrate on another text")
    dtype = torch.float32 if len(hessian) >= WIDE else torch.float64
    damped = hessian[order][:, order].to(dtype)
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal += max(damping * mean, 1e-10) if mean else 1.0
    for _ in range(8):
        lower, failure = torch.linalg.cholesky_ex(damped)
        if not int(failure):
            break
        diagonal += max(damping, 0.01) * mean  # rounding made the matrix indefinite
    else:
        raise ValueError(f"the Hessian has no Cholesky factor at damping {damping}; calibrate on more tokens")
    del damped, diagonal
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
