"""Linears with fp8 weights in Triton against the reference in torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda import linear_fp8_tiles
from pitlane.kernels.cuda.e4m3 import from_e4m3, to_e4m3
from pitlane.kernels.cuda.linear_fp8 import BLOCK, linear, linear_ref, quantize_ref, quantized_inputs
from pitlane.kernels.cuda.tuning import Form
from pitlane.kernels.fp8 import GRANULARITIES, Fp8Linear, quantize

SHAPES = [(37, 102), (64, 128), (131, 300)]  # outputs, inputs


@triton.jit
def decode_kernel(byte, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, from_e4m3(tl.load(byte + at)))


@triton.jit
def encode_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, to_e4m3(tl.load(x + at)))


def make(outputs: int, inputs: int, shared: int) -> tuple[Tensor, Tensor]:
    """Weights with scales of very different sizes, so that a scale of another block or output shows. shared: as in `shared_by`."""
    generator = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)
    shape = (-(-outputs // shared), -(-inputs // BLOCK)) if shared else (outputs,)
    return weight, torch.rand(shape, generator=generator) * torch.logspace(-4, -2, shape[-1])


def near(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.dtype == expected.dtype
    torch.testing.assert_close(
        result.float(), expected.float(), rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def test_all_bytes_are_decoded() -> None:
    byte = torch.arange(256).to(torch.uint8)
    values = torch.empty(256, dtype=torch.float16)
    decode_kernel[(1,)](byte, values, 256)
    torch.testing.assert_close(values.float(), byte.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_values_are_rounded_as_torch_rounds() -> None:
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    x = torch.cat((finite, ties, torch.nextafter(ties, finite[1:]), torch.nextafter(ties, finite[:-1]), torch.randn(6)))
    x = torch.cat((x, torch.full((1024 - len(x),), float("nan"))))
    bytes_of = torch.empty(1024, dtype=torch.uint8)
    encode_kernel[(1,)](x, bytes_of, 1024)
    known = x.isfinite()
    assert torch.equal(bytes_of.view(torch.float8_e4m3fn)[known].float(), x.to(torch.float8_e4m3fn)[known].float())
    assert (bytes_of[~known] & 127 == 127).all() and (~known).any()


@pytest.mark.parametrize("size", [102, BLOCK])
def test_inputs_are_quantized(size: int) -> None:
    x = torch.randn(5, 102 if size == 102 else 300)
    x[1], x[2, 3] = 0, 1e4
    numbers, scales = quantized_inputs(x, size)
    expected, factors = quantize_ref(x, size)
    assert torch.equal(numbers.view(torch.float8_e4m3fn).float(), expected.float()) and torch.equal(scales, factors)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shared", [0, 1, BLOCK])
def test_the_result_is_that_of_the_reference(shared: int, quantized: bool) -> None:
    for outputs, inputs in SHAPES:
        weight, scales = make(outputs, inputs, shared)
        bias = torch.randn(outputs) if outputs % 2 else None
        for rows in (1, 17):
            x = torch.randn(rows, inputs)
            near(
                linear(x, weight, scales, bias, quantized=quantized),
                linear_ref(x, weight, scales, bias, quantized=quantized),
                2e-5,
            )


TILES = Form(16, 32, 128, 4, 3, descriptors=True)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shared", [0, 1, BLOCK])
def test_tiles_by_descriptors_give_the_result_of_the_reference(shared: int, quantized: bool) -> None:
    """15 or 20 tiles for 3 programs; the last tiles of rows, outputs and inputs are incomplete. 150 rows are more than 8 tiles."""
    rows, outputs = (36, 144) if shared else (150, 48)
    weight, scales = make(outputs, 160, shared)
    bias, x = torch.randn(outputs) if shared else None, torch.randn(rows, 160)
    y = linear(x, weight, scales, bias, quantized=quantized, form=TILES)
    near(y, linear_ref(x, weight, scales, bias, quantized=quantized), 2e-5)


def test_sizes_that_no_descriptor_can_describe_run_with_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("called")

    monkeypatch.setattr(linear_fp8_tiles, "run", fail)
    weight, scales = make(64, 102, 0)
    x = torch.randn(17, 102)
    near(linear(x, weight, scales, form=TILES), linear_ref(x, weight, scales), 2e-5)
    weight, scales = make(64, 128, 0)
    with pytest.raises(RuntimeError, match="called"):
        linear(torch.randn(17, 128), weight, scales, form=TILES)


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_of_16_bits_and_strided_rows(quantized: bool) -> None:
    weight, scales = make(40, 136, BLOCK)
    x = torch.randn(70, 140).half()[:, :136]
    near(linear(x, weight, scales, quantized=quantized), linear_ref(x, weight, scales, quantized=quantized), 2**-9)
    weight, scales = make(40, 140, 0)
    weight = weight[:, :136]
    near(
        linear(x, weight, scales[:, None], quantized=quantized),
        linear_ref(x, weight, scales, quantized=quantized),
        2**-9,
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_does_not_depend_on_the_other_rows(quantized: bool) -> None:
    weight, scales = make(48, 256, BLOCK)
    x = torch.randn(7, 256)
    assert torch.equal(
        linear(x, weight, scales, quantized=quantized)[3:4], linear(x[3:4], weight, scales, quantized=quantized)
    )


def test_inputs_that_are_no_numbers_stay_so() -> None:
    weight, scales = make(16, 64, 0)
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    for quantized in (False, True):
        y = linear(x, weight, scales, quantized=quantized)
        assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_linear_of_the_plugin_runs_the_kernel(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two joined weights, the first with a part of a block; inputs keep their 16 bits."""
    weights = [torch.randn(40, 200), torch.randn(150, 200)]
    packed = Fp8Linear([quantize(weight, granularity) for weight in weights], torch.randn(190))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2**-9)):
        x = torch.randn(5, 200).to(dtype)
        expected = packed.reference(x)
        with monkeypatch.context() as patch:
            patch.setattr(Fp8Linear, "reference", None)  # the kernel serves, not torch
            near(packed(x), expected, tolerance)


def test_wrong_inputs_are_refused() -> None:
    weight, scales = make(16, 64, 0)
    with pytest.raises(ValueError, match=r"x must be of 16 or 32 bits \[M, K\], weight float8_e4m3fn"):
        linear(torch.randn(2, 63), weight, scales)
    with pytest.raises(ValueError, match=r"scales must be \[16\], or per 128 inputs of an output, or .*, got \[15\]"):
        linear(torch.randn(2, 64), weight, scales[:15])
    with pytest.raises(ValueError, match="scales must be contiguous float32"):
        linear(torch.randn(2, 64), weight, scales.half())
    with pytest.raises(ValueError, match=r"bias must be \[16\], got \[3\]"):
        linear(torch.randn(2, 64), weight, scales, torch.randn(3))
    assert linear(torch.empty(0, 64), weight, scales).shape == (0, 16)
