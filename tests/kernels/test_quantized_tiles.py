"""Linears of 8 and 4 bits on AMX's tiles: on tiles emulated in C from Intel's manual, and on the CPU's own if it has AMX.

The result must have the bits of the kernel by AVX-512.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from pitlane.kernels.extension import cpu
from pitlane.kernels.packing import UNIT
from pitlane.kernels.quantized import LEVELS, Format, Quantized

CPU = Path(__file__).parents[2] / "kernels" / "cpu"
SOURCES = [path for path in CPU.glob("*.c") if not path.name.startswith("module")]
COMPILER = shutil.which("cc") or shutil.which("gcc")
AVX512, AMX = LEVELS.index("avx512"), LEVELS.index("amx")
FORMS = [Format(8), *(Format(4, True, size, symmetric) for size in (32, 64, 128) for symmetric in (True, False))]
Multiply: TypeAlias = Callable[[Quantized, Tensor], Tensor]

here = pytest.mark.skipif(cpu is None or cpu.int_level() < AVX512, reason="no AVX-512 VNNI")
with_amx = pytest.mark.skipif(cpu is None or cpu.int_level() < AMX, reason="no AMX")


class IntLinear(ctypes.Structure):
    """The struct of linear_int.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "scales", "bias")),
        *((name, ctypes.c_long) for name in ("outs", "ins")),
        *((name, ctypes.c_int) for name in ("bits", "group", "symmetric", "quantized", "wide", "level")),
        ("unit", ctypes.c_float),
    )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    """The kernel compiled with emulated tiles."""
    if COMPILER is None or not CPU.is_dir():
        pytest.skip("no compiler, or no sources")
    library = tmp_path_factory.mktemp("tiles") / "linear.so"
    tiles = f'-DEMULATED_TILES="{Path(__file__).with_name("emulated_tiles.h")}"'
    flags = ["-std=c11", "-O1", "-ffp-contract=off", "-mfma", "-shared", "-fPIC", tiles]
    subprocess.run([COMPILER, *flags, *map(str, SOURCES), "-o", str(library), "-lm"], check=True)
    run = ctypes.CDLL(str(library)).int_linear
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long, ctypes.c_int]

    def multiply(linear: Quantized, x: Tensor) -> Tensor:
        form, (rows, inputs) = linear.form, x.shape
        addresses = (
            0 if tensor is None else tensor.data_ptr() for tensor in (linear.packed, linear.scales, linear.bias)
        )
        sizes = linear.num_outputs, inputs, form.bits, form.input_group, form.symmetric, 1, x.dtype == torch.float32
        job = IntLinear(*addresses, *sizes, AMX, UNIT)
        scratch = torch.empty(rows, inputs // 4 + 2 * (inputs // form.input_group))
        y = torch.full((rows + 1, linear.num_outputs), torch.nan, dtype=x.dtype)
        run(ctypes.addressof(job), x.data_ptr(), y.data_ptr(), scratch.data_ptr(), rows, 2)
        assert y[-1].isnan().all(), "the kernel must not write to the extra row"
        return y[:-1]

    return multiply


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@here
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("outputs, groups", [(75, 11), (16, 1), (96, 2)])
def test_has_the_bits_of_avx512(form: Format, outputs: int, groups: int, emulated: Multiply) -> None:
    """Blocks of 512 inputs and a part of a block; an odd number of panels; groups of a tile, of half a tile, and of two."""
    inputs = groups * form.input_group
    linear = Quantized(outputs, inputs, form, [made(outputs, inputs)], made(outputs), AVX512)
    for rows in (1, 15, 16, 17, 32, 33, 530 if groups == 1 else 48):
        x = made(rows, inputs, seed=1).to(torch.bfloat16 if rows % 2 else torch.float32)
        assert torch.equal(emulated(linear, x), linear(x)), rows


@with_amx
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_cpu_does_as_the_emulation(form: Format, emulated: Multiply) -> None:
    weight = made(75, 11 * form.input_group)
    linear = Quantized(*weight.shape, form, [weight], None, AMX)
    for rows in (16, 17, 33, 530):
        x = made(rows, weight.shape[1], seed=1).bfloat16()
        assert torch.equal(linear(x), emulated(linear, x)), rows
