"""Linears of 8 and 4 bits in Triton against the reference in torch, over the same packed bytes."""

from __future__ import annotations

import pytest
import torch

from pitlane.kernels.cuda.linear import linear, quantized_inputs
from pitlane.kernels.packing import Format, quantize_inputs
from pitlane.kernels.quantized import Quantized

FORMS = [
    Format(8, True),
    Format(8, False),
    *(Format(4, quantized, 32, symmetric) for quantized in (True, False) for symmetric in (True, False)),
    Format(4, True, 64, True),
    Format(4, False, 128, False),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_that_of_the_reference(form: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 102 if form.bits == 8 else 3 * form.group_size
    for outputs, bias in ((64, False), (131, True)):
        weight = torch.randn(outputs, inputs, generator=generator)
        packed = Quantized(outputs, inputs, form, [weight], torch.randn(outputs) if bias else None)
        for rows in (1, 17):
            x = torch.randn(rows, inputs, generator=generator)
            torch.testing.assert_close(linear(x, packed), packed.reference(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[:4])
def test_inputs_of_16_bits(form: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 4 * max(32, form.group_size)
    packed = Quantized(48, inputs, form, [torch.randn(48, inputs, generator=generator)])
    x = torch.randn(3, inputs, generator=generator).half()
    torch.testing.assert_close(linear(x, packed), packed.reference(x), rtol=2**-9, atol=2e-2)
    wide = linear(x, packed, torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.half(), linear(x, packed))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_other_rows(form: Format) -> None:
    inputs = 4 * max(32, form.group_size)
    packed = Quantized(48, inputs, form, [torch.randn(48, inputs)])
    x = torch.randn(7, inputs)
    assert torch.equal(linear(x, packed)[3:4], linear(x[3:4], packed))


def test_inputs_are_rounded_to_nearest_even() -> None:
    x = torch.cat(
        (torch.randn(5, 70), torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 64]), torch.zeros(1, 70))
    )
    numbers, scales = quantized_inputs(x, 64)
    whole, factors = quantize_inputs(x, 64)
    assert torch.equal(numbers.float(), whole.flatten(1)) and torch.equal(scales, factors)


def test_inputs_that_are_no_numbers_stay_so() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    packed = Quantized(16, 64, Format(8), [torch.randn(16, 64)])
    y = linear(x, packed)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_wrong_inputs_are_refused() -> None:
    packed = Quantized(16, 32, Format(8), [torch.randn(16, 32)])
    with pytest.raises(ValueError, match=r"x must be of 16 or 32 bits \[M, 32\], got torch.float32 \[2, 33\]"):
        linear(torch.randn(2, 33), packed)
