"""Rounding to nearest, GPTQ and the searches of AWQ and SmoothQuant, against exact solutions of small cases in float64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from pitlane.kernels.packing import UNIT, Format, quantize_groups, quantize_inputs, quantize_rows
from pitlane.kernels.quantize_math import (
    Codes,
    Grid,
    InputStats,
    gptq,
    output_error,
    quantize_linear,
    significant,
)
from pitlane.kernels.scale_search import awq_scales, clip_shares, clipped, smooth_scales


def stats_of(inputs: Tensor) -> InputStats:
    return InputStats(len(inputs), inputs.abs().amax(0), inputs.square().mean(0), inputs.T @ inputs, inputs[:64])


def correlated(rows: int, size: int, seed: int = 0) -> Tensor:
    """Inputs whose channels are correlated and of unequal size, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mix * sizes


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- round to nearest


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_to_nearest_is_off_by_half_a_step(bits: int, symmetric: bool) -> None:
    weight = normal(5, 96).float()
    codes = quantize_linear(weight, bits, 32, symmetric)
    low, high = Grid(bits, 32, symmetric).limits
    assert codes.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert int(codes.codes.min()) >= low and int(codes.codes.max()) <= high
    assert codes.scales.shape == (5, 3) and (codes.zeros is None) == symmetric
    steps = (codes.dequantized() - weight).unflatten(1, (3, 32)).abs() / codes.scales.abs()[..., None]
    # The highest code of a symmetric grid is a step below the lowest: a weight of that sign is off by up to a step.
    assert float(steps.max()) < (1.01 if bits < 8 or not symmetric else 0.53)
    assert float(steps.mean()) == pytest.approx(0.25, abs=0.04)


def test_four_symmetric_bits_and_eight_bits_are_those_of_the_packed_kernels() -> None:
    weight = normal(7, 128).float()
    numbers, scales, _ = quantize_groups(weight, Format(4, True, 32, True))
    codes = quantize_linear(weight, 4, 32)
    assert torch.equal(codes.codes.float(), numbers.flatten(1) - 8)
    assert torch.equal(codes.scales, scales.float() * UNIT)
    rows, _ = quantize_rows(weight)
    assert float((quantize_linear(weight, 8).codes - rows).abs().max()) <= 1


def test_more_bits_and_smaller_groups_have_smaller_errors() -> None:
    weight = normal(16, 256)
    errors = [float((quantize_linear(weight, bits, 64).dequantized() - weight).norm()) for bits in range(2, 9)]
    assert all(few > 1.7 * many for few, many in pairwise(errors))
    sizes = [float((quantize_linear(weight, 3, size).dequantized() - weight).norm()) for size in (32, 64, 128, 0)]
    assert sizes == sorted(sizes)


def test_zeros_and_one_weight_per_group_survive() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = -3.75
    for symmetric in (True, False):
        assert torch.equal(quantize_linear(weight, 4, 32, symmetric).dequantized(), weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"bits": 4, "group_size": 48}, "got 48 and 64; 0 makes a row a group"),
        ({"bits": 4, "method": "best"}, "unknown method 'best'; known: rtn, gptq"),
        ({"bits": 4, "method": "gptq"}, "gptq needs the statistics"),
        ({"bits": 4, "clip": True}, "clip needs the statistics"),
    ],
)
def test_bad_calls_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_linear(normal(4, 64), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        quantize_linear(torch.full((2, 4), torch.nan), 4)


def test_order_turns_codes_back() -> None:
    codes = Codes(
        torch.tensor([[1, 2, 3, 4]], dtype=torch.int8), torch.tensor([[1.0, 10.0]]), order=torch.tensor([2, 0, 3, 1])
    )
    assert codes.dequantized().tolist() == [[2.0, 40.0, 1.0, 30.0]]


# ---- GPTQ


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def stepwise(weight: Tensor, grid: Grid, hessian: Tensor, order: list[int]) -> Tensor:
    """The definition of GPTQ: round a column, then solve the least squares problem of the columns that are left, exactly."""
    scales, _ = grid.fitted(weight.unflatten(1, (-1, grid.size)))
    result = weight.clone()
    for i, column in enumerate(order):
        scale = scales[:, column // grid.size]
        result[:, column] = grid.rounded(result[:, column], scale, None) * scale
        done, left = order[: i + 1], order[i + 1 :]
        if left:
            # The gradient of (W' - W) H (W' - W)^T by the columns that are left is zero.
            difference = (result - weight)[:, done] @ hessian[done][:, left]
            result[:, left] = weight[:, left] - torch.linalg.solve(hessian[left][:, left], difference.T).T
    return result


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_the_exact_solution_of_its_steps(act_order: bool) -> None:
    weight, hessian = normal(6, 24), stats_of(correlated(200, 24)).hessian
    assert hessian is not None
    grid = Grid(3, 24, True)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(24))
    expected = stepwise(weight, grid, damped(hessian, 0.01), order)
    result = gptq(weight, grid, hessian, act_order, 0.01).dequantized().double()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


def test_gptq_lies_between_the_best_of_all_codes_and_round_to_nearest() -> None:
    """Brute force over all 4^4 codes of a row of four weights in two bits."""
    inputs = correlated(50, 4, seed=4)
    hessian = damped(inputs.T @ inputs, 0.01)
    weight, grid = normal(40, 4, seed=5), Grid(2, 4, True)
    scales, _ = grid.fitted(weight[:, None])
    codes = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.float64)
    differences = codes[None] * scales[:, :, None] - weight[:, None]
    optimum = ((differences @ hessian) * differences).sum(2).amin(1)
    nearest = output_error(quantize_linear(weight, 2, 4).dequantized().double() - weight, hessian)
    ours = output_error(gptq(weight, grid, inputs.T @ inputs, True, 0.01).dequantized().double() - weight, hessian)
    assert bool((ours >= optimum * (1 - 1e-9)).all())
    assert float(ours.sum()) < 0.85 * float(nearest.sum())
    shares = [float((errors <= optimum * (1 + 1e-6)).double().mean()) for errors in (ours, nearest)]
    assert shares[0] > 0.9 and shares[1] < 0.5  # of the rows with the best codes


def test_with_independent_inputs_gptq_is_round_to_nearest() -> None:
    weight, hessian = normal(8, 32), torch.diag(torch.logspace(-1, 2, 32, dtype=torch.float64))
    expected = quantize_linear(weight, 4, 32).codes
    assert torch.equal(gptq(weight, Grid(4, 32, True), hessian, True, 0.0).codes, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 128, 0])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_round_to_nearest(act_order: bool, size: int, symmetric: bool) -> None:
    weight, stats = normal(24, 256).float(), stats_of(correlated(600, 256))
    assert stats.hessian is not None
    nearest, ours = (
        quantize_linear(weight, 3, size, symmetric, method, stats, act_order=act_order).dequantized() - weight
        for method in ("rtn", "gptq")
    )
    errors = [float(output_error(difference.double(), stats.hessian).sum()) for difference in (nearest, ours)]
    assert errors[1] < 0.75 * errors[0]


def test_gptq_serves_channels_that_no_token_uses_and_few_tokens() -> None:
    inputs = correlated(10, 64)
    inputs[:, 7] = 0
    weight = normal(4, 64).float()
    result = quantize_linear(weight, 4, 32, method="gptq", stats=stats_of(inputs)).dequantized()
    assert bool(result.isfinite().all())
    nothing = quantize_linear(weight, 4, 32, method="gptq", stats=stats_of(0 * inputs))
    assert torch.equal(nothing.codes, quantize_linear(weight, 4, 32).codes)


# ---- AWQ and SmoothQuant


def rounded(weight: Tensor) -> Tensor:
    return quantize_linear(weight, 3, 32).dequantized().to(weight.dtype)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_of_awq_never_ends_worse_than_its_start(seed: int) -> None:
    weight, stats = normal(16, 64, seed=seed), stats_of(correlated(300, 64, seed))
    assert stats.hessian is not None
    search = awq_scales(weight, stats, rounded)
    nearest = float(output_error(rounded(weight) - weight, stats.hessian).sum())
    assert search.start == pytest.approx(nearest) and search.error <= search.start
    actual = rounded(weight * search.scales) / search.scales - weight
    assert float(output_error(actual, stats.hessian).sum()) == pytest.approx(search.error)
    shares, before, after = clip_shares(weight, stats.hessian, 32, rounded)
    assert bool((after <= before).all())
    actual = rounded(clipped(weight, shares, 32)) - weight
    torch.testing.assert_close(output_error(actual, stats.hessian), after)


def test_awq_protects_a_channel_of_large_inputs() -> None:
    inputs = normal(400, 64)
    inputs[:, 5] *= 50
    search = awq_scales(normal(16, 64, seed=2), stats_of(inputs), rounded)
    assert search.error < 0.5 * search.start
    assert float(search.scales[5]) > 3 * float(search.scales[6])


def test_smoothing_rescues_outlier_channels() -> None:
    """Inputs in 8 bits with one scale per token; a channel is 300 times larger than the rest."""
    inputs = normal(400, 64)
    inputs[:, 5] *= 300

    def eight_bits(weight: Tensor) -> Tensor:
        numbers, scales = quantize_rows(weight)
        return numbers * scales[:, None]

    def inputs_in_eight_bits(x: Tensor) -> Tensor:
        numbers, scales = quantize_inputs(x, 64)
        return (numbers * scales[..., None]).flatten(1).double()

    search = smooth_scales(normal(16, 64, seed=2), stats_of(inputs), eight_bits, inputs_in_eight_bits)
    assert search.error < 0.05 * search.start
    assert float(search.scales[5]) > 10 * float(search.scales[6])


def test_scales_have_the_bits_that_packed_weights_keep() -> None:
    scales = normal(1000).float() * 0.1
    assert torch.equal((significant(scales) / UNIT).half().float() * UNIT, significant(scales))
    with pytest.raises(ValueError, match="a weight is larger"):
        significant(torch.tensor([100.0]))
