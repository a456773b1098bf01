"""Linears of 8 and 4 bits: packing, the kernel in C against the reference at every level, rows in any batch, faults, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pitlane.kernels import quantized
from pitlane.kernels.extension import cpu
from pitlane.kernels.quantize_math import quantize_linear
from pitlane.kernels.quantized import LEVELS, Format, Quantized
from pitlane.ui.cli import main

here = pytest.mark.skipif(cpu is None, reason="no kernels here")
CPU = torch.device("cpu")
FORMS = [
    Format(8, True),
    Format(8, False),
    *(Format(4, q, size, symmetric) for q in (True, False) for size in (32, 128) for symmetric in (True, False)),
    Format(4, True, 64, False),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_level = pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
each_dtype = pytest.mark.parametrize("dtype", quantized.DTYPES, ids=str)
BF16_STEP = 2.0**-8  # largest relative error of rounding to bfloat16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget the comparisons and the warnings of this process."""
    for known in (quantized._agrees, quantized._warn):
        known.cache_clear()
    yield
    for known in (quantized._agrees, quantized._warn):
        known.cache_clear()


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def widths(form: Format) -> list[int]:
    """Numbers of inputs: few, odd, an odd and an even number of groups, more than the kernel converts at a time, and blocks of wide
    tiles."""
    return [1, 7, 102, 1096, 2052] if form.bits == 8 else [form.group_size * count for count in (1, 2, 3, 20)]


def weight_of(linear: Quantized) -> Tensor:
    """The weight that a linear computes with, in float64."""
    form = linear.form._replace(quantized=False)
    plain = Quantized.__new__(Quantized)
    plain.__dict__ |= vars(linear) | {"form": form, "bias": None, "level": None}
    return plain.reference(torch.eye(linear.num_inputs, dtype=torch.float64)).T


# ---- packing


@each_form
def test_a_weight_is_off_by_half_a_step_and_takes_the_bytes_that_are_planned(form: Format) -> None:
    for inputs in widths(form):
        weight = made(75, inputs)
        linear = Quantized(75, inputs, form, [weight[:3], weight[3:40], weight[40:]])
        error = (weight_of(linear) - weight).abs()
        if form.bits == 8:
            assert bool((error <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all())
        else:
            groups, error = weight.unflatten(1, (-1, form.group_size)), error.unflatten(1, (-1, form.group_size))
            spread = groups.amax(2) - groups.amin(2)
            bound = groups.abs().amax(2) / 8 if form.symmetric else spread / 30
            assert bool((error.amax(2) <= 1.005 * bound + 2e-3 * groups.abs().amax(2)).all())
        scales = 0 if linear.scales is None else linear.scales.nbytes
        assert linear.packed.nbytes + scales == form.num_bytes(75, inputs)


@each_form
def test_pieces_of_a_weight_are_packed_as_the_whole(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made(200, 128)
    whole = Quantized(200, 128, form, [weight])
    monkeypatch.setattr(quantized, "CHUNK", 128 * 48)  # chunks of 3 panels
    pieces = Quantized(200, 128, form, iter([weight[:1], weight[1:150], weight[150:]]))
    assert torch.equal(pieces.packed, whole.packed) and pieces.panels_per_chunk == 3
    assert form.bits == 4 or torch.equal(pieces.scales, whole.scales)  # type: ignore[arg-type]
    x = made(3, 128)
    torch.testing.assert_close(pieces.reference(x), whole.reference(x))


def test_a_grid_of_16_steps_is_kept_exactly() -> None:
    """Weights that were d n + m with n in [0, 15], both ends used: as of Q4_1."""
    numbers = torch.randint(0, 16, (32, 8, 32), generator=torch.Generator().manual_seed(1)).float()
    numbers[..., 0], numbers[..., 1] = 0, 15
    steps, lows = made(32, 8, 1).abs().half().float() / 64, made(32, 8, 1).half().float()
    weight = (numbers * steps + lows).flatten(1)
    linear = Quantized(32, 256, Format(4, False, 32, False), [weight])
    assert bool(((weight_of(linear) - weight).abs() <= 1e-3 * steps.expand(-1, -1, 32).flatten(1) + 1e-6).all())


@pytest.mark.parametrize("form", [Format(8), Format(4, True, 32, True), Format(4, True, 32, False)], ids=str)
def test_zeros_and_tiny_weights(form: Format) -> None:
    weight = torch.zeros(16, 32)
    weight[3] = 1e-6 * made(32)
    linear = Quantized(16, 32, form, [weight])
    error = (weight_of(linear) - weight).abs()
    assert float(error[3].max()) < 2e-7 and float(error[:3].max()) == 0
    assert torch.equal(linear.reference(torch.zeros(2, 32)), torch.zeros(2, 16))


def test_weights_that_4_bits_cannot_hold_are_refused() -> None:
    for value in (1e6, float("inf"), float("nan")):
        weight = made(16, 32)
        weight[2, 2] = value
        for symmetric in (True, False):
            with pytest.raises(ValueError, match="4 bits hold weights of up to 64"):
                Quantized(16, 32, Format(4, True, 32, symmetric), [weight])


def test_rows_of_an_embedding() -> None:
    weight = made(50, 30)
    linear = Quantized(50, 30, Format(8), [weight])
    index = torch.tensor([49, 0, 17])
    expected = linear.rows(index)
    torch.testing.assert_close(expected.double(), weight_of(linear)[index])
    if cpu is not None:
        linear.level = 0
        assert torch.equal(linear.rows(index), expected) and linear.rows(index[:0]).shape == (0, 30)
        with pytest.raises(ValueError, match="not below the number of rows"):
            linear.rows(torch.tensor([1, 50]))


# ---- the kernel


@here
@each_level
@each_dtype
@each_form
def test_equals_the_reference_and_a_row_is_the_same_in_any_batch(form: Format, dtype: torch.dtype, level: int) -> None:
    if level > cpu.int_level():
        pytest.skip("this CPU has no such instructions")
    for inputs in widths(form):
        weight, bias, x = made(75, inputs), made(75), made(60, inputs, seed=1).to(dtype)
        linear = Quantized(75, inputs, form, [weight], bias, level)
        result, expected = linear(x), linear.reference(x)
        assert result.dtype == dtype and result.shape == (60, 75)
        size = x.double().abs() @ weight.double().abs().T + 1
        step = BF16_STEP if dtype == torch.bfloat16 else 0.0
        error = (result.double() - expected.double()).abs()
        assert bool((error <= 2 * step * expected.double().abs() + 4e-6 * size).all())
        for first, last in [(0, 1), (3, 5), (0, 12), (5, 18), (31, 60), (59, 60)]:
            assert torch.equal(linear(x[first:last]), result[first:last])
        wide = linear.wide(x)
        assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), result)
        assert bool(((wide.double() - linear.reference(x, torch.float32).double()).abs() <= 4e-6 * size).all())
        assert torch.equal(linear.wide(x[3:5]), wide[3:5])
        assert linear(x[:0]).shape == (0, 75)


@here
@each_form
def test_two_threads_and_strided_rows_change_no_bit(form: Format) -> None:
    inputs = 256
    linear = Quantized(1000, inputs, form, [made(1000, inputs)], None, cpu.int_level())
    x, before = made(300, 2 * inputs).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = linear(x[:, :inputs].clone())
        torch.set_num_threads(2)
        for rows in (1, 13, 300):
            assert torch.equal(linear(x[:rows, :inputs]), expected[:rows])
    finally:
        torch.set_num_threads(before)


@here
@each_level
def test_extreme_inputs(level: int) -> None:
    """A large width; zeros; infinity."""
    if level > cpu.int_level():
        pytest.skip("this CPU has no such instructions")
    width = 2**16
    linear = Quantized(16, width, Format(8), [torch.ones(16, width)], None, level)
    x = torch.ones(3, width)
    x[1], x[2, 5] = 0, torch.inf
    y = linear(x)
    assert torch.allclose(y[0], torch.tensor(float(width)), rtol=1e-5)
    assert not y[1].any() and not y[2].isfinite().any()


def test_a_large_input_costs_the_other_groups_nothing() -> None:
    weight, x = made(16, 128), made(2, 128)
    weight[:, :64] = 0
    x[1, 3] = 1e6
    linear = Quantized(16, 128, Format(8), [weight], None, None if cpu is None else cpu.int_level())
    exact = x.double() @ weight_of(linear).T
    assert float((linear(x).double() - exact).norm() / exact.norm()) < 0.01


# ---- where it cannot run


@here
@each_form
def test_a_kernel_with_a_fault_is_not_used_and_the_fault_is_reported(
    form: Format, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty:
        """Forgets the bias."""

        int_level = staticmethod(cpu.int_level)

        @staticmethod
        def int_linear(*arguments: Any) -> None:
            cpu.int_linear(*arguments[:3], 0, *arguments[4:])

    assert quantized.unavailable(form, torch.float32, CPU) is None
    quantized._agrees.cache_clear()
    monkeypatch.setattr(quantized, "cpu", Faulty)
    assert "differs from the reference" in str(quantized.unavailable(form, torch.float32, CPU))
    with caplog.at_level("WARNING", "pitlane"):
        assert quantized.chosen_level(form, 256, torch.float32, CPU) is None
    assert "torch computes, not the kernel in C: its result differs" in caplog.text
    assert quantized.state(Format(8)).startswith("torch computes: ")


def test_says_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Format(8)
    assert "not for float16 on cpu" in str(quantized.unavailable(form, torch.float16, CPU))
    assert "on cuda" in str(quantized.unavailable(form, torch.bfloat16, torch.device("cuda")))
    monkeypatch.setenv("PITLANE_CPU_KERNELS", "avx9")
    assert "avx9 is unknown; use plain, avx2, avx512, amx" in str(quantized.unavailable(form, torch.bfloat16, CPU))
    monkeypatch.delenv("PITLANE_CPU_KERNELS")
    monkeypatch.setattr(quantized, "cpu", None)
    assert "built without a C compiler" in str(quantized.unavailable(form, torch.bfloat16, CPU))


@here
def test_the_environment_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    best = cpu.int_level()
    for level, name in enumerate(LEVELS):
        monkeypatch.setenv("PITLANE_CPU_KERNELS", name)
        assert cpu.int_level() == min(level, best)
        assert quantized.state(Format(8)) == f"ok by {LEVELS[min(level, best)]}"
        result = CliRunner().invoke(main, ["plugins", "list"])
        assert result.exit_code == 0 and "nothing reads it" not in result.stderr


@here
@pytest.mark.parametrize(
    "arguments",
    [
        (1, 1, 0, 0, 1, 1, 1, 16, 64, 8, 64, 1, 1, 1, 0, 1, 1.0),  # no scales
        (1, 1, 1, 0, 1, 1, 1, 16, 2000000, 8, 64, 1, 1, 1, 0, 1, 1.0),
        (1, 1, 1, 0, 1, 1, 1, 16, 80, 4, 64, 1, 1, 1, 0, 1, 1.0),
        (1, 1, 1, 0, 1, 1, 1, 16, 80, 4, 16, 1, 1, 1, 0, 1, 1.0),
        (1, 1, 1, 0, 1, 1, 1, 16, 80, 5, 64, 1, 1, 1, 0, 1, 1.0),
        (1, 1, 1, 0, 1, 1, 1, 16, 64, 8, 64, 1, 1, 1, 3, 1, 1.0),
        (1, 1, 1, 0, 1, 1, 1, 16, 64, 8, 64, 1, 1, 1, 0, 0, 1.0),
        (0, 1, 1, 0, 1, 1, 1, 16, 64, 8, 64, 1, 1, 1, 0, 1, 1.0),
        (1, 1, 1, 0, 1, 1, -1, 16, 64, 8, 64, 1, 1, 1, 0, 1, 1.0),
    ],
)
def test_c_refuses_sizes_that_no_memory_has(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        cpu.int_linear(*arguments)


def test_wrong_shapes_are_refused() -> None:
    weight, form = made(16, 64), Format(8)
    for arguments, words in (
        ((17, 64, form, [weight]), "17 outputs, got 16"),
        ((16, 60, form, [weight]), r"\[16, 60\], got rows of 64"),
        ((16, 64, form, [weight], made(15)), "16 outputs"),
        ((16, 64, Format(4, True, 48, True), [weight]), "got 48"),
        ((16, 64, Format(4, True, 128, True), [weight]), "divide 64 inputs, got 128"),
        ((16, 2**21, form, [], None, 0), "up to 1048576 inputs, got 2097152"),
    ):
        with pytest.raises(ValueError, match=words):
            Quantized(*arguments)  # type: ignore[arg-type]
    if cpu is not None:
        linear = Quantized(16, 64, form, [weight], None, 0)
        for x in (made(2, 60), made(2, 64).double()):
            with pytest.raises(ValueError, match=r"\[M, 64\], got"):
                linear(x)


@pytest.mark.parametrize("outputs", [16, 37, 300])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_codes_are_packed_as_they_are(outputs: int, bits: int, symmetric: bool) -> None:
    """Packed codes multiply as the weight that they stand for, though rounding it again would give other codes."""
    generator = torch.Generator().manual_seed(0)
    size = 32 if bits == 4 else 0
    weight = torch.randn(outputs, 96, generator=generator)
    codes = quantize_linear(weight, bits, size, symmetric)
    codes = codes._replace(codes=codes.codes.roll(1, 1).clamp(-3, 3))
    form = Format(bits, False, size, symmetric)
    bias = torch.randn(outputs, generator=generator)
    linear = Quantized(outputs, 96, form, codes, bias)
    x = torch.randn(5, 96, generator=generator)
    expected = x @ codes.dequantized().T + bias
    tolerance = 1e-5 if symmetric else 2e-3  # a low has 11 significant bits
    torch.testing.assert_close(linear(x), expected, rtol=tolerance, atol=20 * tolerance)
    with pytest.raises(ValueError, match=f"codes must be \\[{outputs}, 64\\]"):
        Quantized(outputs, 64, form, codes)
    with pytest.raises(ValueError, match="both be symmetric"):
        Quantized(outputs, 96, form, codes._replace(zeros=None if codes.zeros is not None else codes.scales))
