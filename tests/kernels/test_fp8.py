"""float8 weights: rounding by an own formula for every bfloat16, decoding of every byte, the kernel against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pitlane.kernels import fp8
from pitlane.kernels.fp8 import PLAIN, VECTORS, Float8, Fp8Linear, quantize, to_float8

LEVELS = [(torch.float32, PLAIN), (torch.bfloat16, PLAIN), (torch.bfloat16, VECTORS)]
here = pytest.mark.skipif(fp8.unavailable() is not None, reason=str(fp8.unavailable()))


def skip_without(level: int) -> None:
    if level == VECTORS and not fp8.cpu.has_fp8_vectors():
        pytest.skip("this CPU has no AVX2")


def rounded_by_formula(value: float) -> float:
    """The nearest number of e4m3, ties to the even mantissa; beyond 448 it is 448."""
    size = min(abs(value), 448.0)
    step = 2.0 ** (max(math.frexp(size)[1] - 1, -6) - 3) if size else 1.0
    return math.copysign(min(round(size / step) * step, 448.0), value)  # round() takes ties to even


def test_every_bfloat16_is_rounded_as_by_the_formula_and_as_by_torch() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    got = to_float8(finite)
    assert got.float().tolist() == [rounded_by_formula(value) for value in finite.tolist()]
    inside = finite[finite.abs() <= 448]
    assert torch.equal(to_float8(inside).view(torch.uint8), inside.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(to_float8(inside.float()).view(torch.uint8), to_float8(inside).view(torch.uint8))
    assert to_float8(every[every.isnan()]).isnan().all()


@here
@pytest.mark.parametrize(("dtype", "level"), LEVELS)
def test_the_kernel_widens_every_byte(dtype: torch.dtype, level: int) -> None:
    skip_without(level)
    numbers = torch.arange(256).to(torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F]
    weight = Float8(numbers.view(torch.float8_e4m3fn)[:, None].expand(-1, 2).contiguous(), torch.ones(254, 1), 2)
    y = Fp8Linear([weight], None, level)(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype))
    expected = numbers.view(torch.float8_e4m3fn).float()
    assert torch.equal(y.float(), expected.expand(2, -1))


@here
@pytest.mark.parametrize("granularity", fp8.GRANULARITIES)
@pytest.mark.parametrize(("dtype", "level"), LEVELS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 2), (9, 37, 70), (200, 33, 300), (3, 160, 514)])
def test_the_kernel_is_near_float64(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, level: int, granularity: str
) -> None:
    skip_without(level)
    generator = torch.Generator().manual_seed(rows)
    weight = quantize(torch.randn(outputs, inputs, generator=generator), granularity)
    bias = torch.randn(outputs, generator=generator)
    linear, x = Fp8Linear([weight], bias, level), torch.randn(rows, inputs, generator=generator).to(dtype)
    exact = x.double() @ weight.widened().double().T + bias.double()
    size = x.double().abs() @ weight.widened().double().abs().T + bias.double().abs()
    bound = size * 2**-20 + (exact.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
    for y in (linear(x), linear.reference(x)):
        assert ((y.double() - exact).abs() <= bound).all()
    wide = linear.wide(x)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), linear(x))
    assert ((wide.double() - exact).abs() <= size * 2**-20).all(), "sums are not rounded"


@here
@pytest.mark.parametrize(("dtype", "level"), LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, level: int, threads: int) -> None:
    skip_without(level)
    generator = torch.Generator().manual_seed(0)
    linear = Fp8Linear([quantize(torch.randn(130, 390, generator=generator), "block")], None, level)
    x = torch.randn(410, 390, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear(x)
        for first, count in ((0, 1), (7, 2), (30, 8), (50, 9), (60, 193), (409, 1), (0, 0)):
            assert torch.equal(linear(x[first : first + count]), whole[first : first + count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("granularity", fp8.GRANULARITIES)
def test_an_error_is_at_most_a_sixteenth(granularity: str) -> None:
    weight = torch.randn(150, 290, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 1, 150)[:, None]
    got = quantize(weight, granularity)
    unit = got.scales.repeat_interleave(got.group, 1)[:, :290]
    assert ((got.widened() - weight).abs() <= torch.maximum(weight.abs() / 16, unit * 2**-10) * (1 + 1e-6)).all()
    count = {"tensor": 1, "channel": 150, "block": 6}[granularity]
    assert len(set(got.scales.flatten().tolist())) == count
    largest = got.numbers.float().abs()
    assert largest.amax() == 448 and (granularity != "channel" or bool((largest.amax(1) == 448).all()))


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(40, 64)
    assert torch.equal(quantize(weight, "channel").widened(), weight)


def test_odd_inputs_run_in_torch() -> None:
    cpu = torch.device("cpu")
    assert fp8.chosen_level(71, 71, torch.bfloat16, cpu) is None
    assert fp8.chosen_level(70, 35, torch.bfloat16, cpu) is None
    weight = quantize(torch.randn(40, 71, generator=torch.Generator().manual_seed(3)), "channel")
    x = torch.randn(5, 71, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(Fp8Linear([weight])(x), x @ weight.widened().T, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.zeros(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, "channel")
    with pytest.raises(ValueError, match="no number"):
        Fp8Linear([Float8(torch.full((2, 4), float("nan")).to(fp8.FLOAT8), torch.ones(2, 1), 4)])
    with pytest.raises(ValueError, match="granularity must be tensor, channel, block, got 'row'"):
        quantize(torch.zeros(4, 8), "row")


@here
def test_the_c_function_refuses_what_it_cannot_run() -> None:
    x = torch.zeros(4, 8)
    at = x.data_ptr()
    for values, words in [
        ((at, at, at, 0, at, -1, 8, 8, 8, 1, 1, 0, 1), "rows >= 0"),
        ((at, at, at, 0, at, 1, 8, 7, 8, 1, 1, 0, 1), "even"),
        ((at, at, at, 0, at, 1, 8, 8, 3, 1, 1, 0, 1), "even"),
        ((at, at, at, 0, at, 1, 8, 8, 8, 1, 1, 2, 1), "level"),
        ((at, at, at, 0, at, 1, 8, 8, 8, 1, 1, VECTORS, 1), "level"),
        ((0, at, at, 0, at, 1, 8, 8, 8, 1, 1, 0, 1), "address"),
        ((at, at, at, 0, at, 1, 8, 8, 8, 1, 1, 0, 0), "threads"),
    ]:
        with pytest.raises(ValueError, match=words):
            fp8.cpu.fp8_linear(*values)


def test_pack_and_unpack() -> None:
    numbers = torch.arange(75 * 10).view(75, 10).to(torch.uint8)
    packed: Tensor = fp8.pack(numbers)
    assert torch.equal(fp8.unpack(packed)[:75], numbers) and packed.shape == (3, 5, 32, 2)
