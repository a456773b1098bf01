"""Linears with fp8 weights in Triton against the reference in torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.linear_fp8 import (
    BLOCK,
    from_e4m3,
    linear,
    linear_ref,
    quantize_ref,
    quantized_inputs,
    to_e4m3,
)

SHAPES = [(37, 102), (64, 128), (131, 300)]  # outputs, inputs


@triton.jit
def decode_kernel(byte, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, from_e4m3(tl.load(byte + at)))


@triton.jit
def encode_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, to_e4m3(tl.load(x + at)))


def make(outputs: int, inputs: int, blocks: bool) -> tuple[Tensor, Tensor]:
    """Weights with scales of very different sizes, so that a scale of another block or output shows."""
    generator = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)
    shape = (-(-outputs // BLOCK), -(-inputs // BLOCK)) if blocks else (outputs,)
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
@pytest.mark.parametrize("blocks", [False, True])
def test_the_result_is_that_of_the_reference(blocks: bool, quantized: bool) -> None:
    for outputs, inputs in SHAPES:
        weight, scales = make(outputs, inputs, blocks)
        bias = torch.randn(outputs) if outputs % 2 else None
        for rows in (1, 5, 17):
            x = torch.randn(rows, inputs)
            near(
                linear(x, weight, scales, bias, quantized=quantized),
                linear_ref(x, weight, scales, bias, quantized=quantized),
                2e-5,
            )


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_of_16_bits_and_strided_rows(quantized: bool) -> None:
    weight, scales = make(40, 136, True)
    x = torch.randn(70, 140).half()[:, :136]
    near(linear(x, weight, scales, quantized=quantized), linear_ref(x, weight, scales, quantized=quantized), 2**-9)
    weight, scales = make(40, 140, False)
    weight = weight[:, :136]
    near(
        linear(x, weight, scales[:, None], quantized=quantized),
        linear_ref(x, weight, scales, quantized=quantized),
        2**-9,
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_does_not_depend_on_the_other_rows(quantized: bool) -> None:
    weight, scales = make(48, 256, True)
    x = torch.randn(7, 256)
    assert torch.equal(
        linear(x, weight, scales, quantized=quantized)[3:4], linear(x[3:4], weight, scales, quantized=quantized)
    )


def test_inputs_that_are_no_numbers_stay_so() -> None:
    weight, scales = make(16, 64, False)
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    for quantized in (False, True):
        y = linear(x, weight, scales, quantized=quantized)
        assert y[0].isnan().all() and y[1].isfinite().all()


def test_wrong_inputs_are_refused() -> None:
    weight, scales = make(16, 64, False)
    with pytest.raises(ValueError, match=r"x must be of 16 or 32 bits \[M, K\], weight float8_e4m3fn"):
        linear(torch.randn(2, 63), weight, scales)
    with pytest.raises(ValueError, match=r"scales must be \[16\] or a value per 128 x 128, got \[15\]"):
        linear(torch.randn(2, 64), weight, scales[:15])
    with pytest.raises(ValueError, match="scales must be contiguous float32"):
        linear(torch.randn(2, 64), weight, scales.half())
    with pytest.raises(ValueError, match=r"bias must be \[16\], got \[3\]"):
        linear(torch.randn(2, 64), weight, scales, torch.randn(3))
    assert linear(torch.empty(0, 64), weight, scales).shape == (0, 16)
