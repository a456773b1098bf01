"""Linear with weights of 8 or 4 bits: y [M, N] = x [M, K] W [N, K]^T + bias, in C on a CPU, else in torch.

packing.py says how weights and inputs are rounded. The packed bytes serve C and torch, so weights take no more memory where the
kernel cannot run. Bytes moved: N K (8 bits), N K / 2 and 2 or 4 per group (4 bits), once per 192 rows. In C a row's result has the
same bits in any batch; in torch only if inputs are rounded to 8 bits.
Source: Dettmers et al. 2022 (LLM.int8(), scales by row and token); llama.cpp (inputs in groups); Intel's VPDPBUSD.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from pitlane.kernels.cuda import device as triton
from pitlane.kernels.extension import LEVELS, MISSING, cpu
from pitlane.kernels.linear import checked_inputs
from pitlane.kernels.packing import (
    GROUP_SIZES,
    PANEL,
    UNIT,
    pack_codes,
    pack_groups,
    pack_rows,
    product_ref,
    quantize_groups,
    quantize_rows,
)
from pitlane.kernels.packing import Format as Format
from pitlane.kernels.pages import in_huge_pages
from pitlane.kernels.quantize_math import Codes

log = logging.getLogger("pitlane")
DTYPES = (torch.bfloat16, torch.float32)  # of the kernel
BF16, FLOATS, FLOAT_OUTPUTS = range(3)  # dtypes of x and y in the kernel, INT_... in linear_int.h
MAX_INPUTS = 2**20  # of the kernel
CHUNK = 2**19  # weights that are packed or unpacked at once


def peak_bytes(num_inputs: int) -> int:
    """Most memory that packing needs beside its result."""
    return 32 * max(CHUNK, PANEL * num_inputs)


class Quantized:
    """A packed weight [N, K], its scales (8 bits) and its bias. Calling it with x [M, K] returns y [M, N] in x's dtype.

    weights: pieces of the weight, one after another, of any number of rows; read once. Or `Codes`: the whole weight, rounded
    to the grid of `form`, with its own scales. packed: bytes [ceil(N / 16), panel bytes].
    level: of the kernel in C, an index of LEVELS; None: Triton computes on CUDA, and torch elsewhere (`reference`).
    """

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        form: Format,
        weights: Iterable[Tensor] | Codes,
        bias: Tensor | None = None,
        level: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._prepare(num_outputs, num_inputs, form, bias, level, device)
        row, step = 0, self.panels_per_chunk * PANEL
        if isinstance(weights, Codes):
            row = self._pack_codes(weights, step)
            weights = ()
        for piece in _pieces(weights, step):
            if piece.shape[1] != num_inputs:
                raise ValueError(f"the weight must be [{num_outputs}, {num_inputs}], got rows of {piece.shape[1]}")
            self._pack(piece, row)
            row += len(piece)
        if row != num_outputs or (bias is not None and bias.shape != (num_outputs,)):
            raise ValueError(f"weight and bias must have {num_outputs} outputs, got {row}")

    def _prepare(
        self,
        num_outputs: int,
        num_inputs: int,
        form: Format,
        bias: Tensor | None,
        level: int | None,
        device: torch.device | str,
    ) -> None:
        """Check the sizes and make room for the packed weight."""
        if form.bits == 4 and (form.group_size not in GROUP_SIZES or num_inputs % form.group_size):
            raise ValueError(f"group_size must be 32, 64 or 128 and divide {num_inputs} inputs, got {form.group_size}")
        if level is not None and num_inputs > MAX_INPUTS:
            raise ValueError(f"the kernel takes up to {MAX_INPUTS} inputs, got {num_inputs}")
        self.num_outputs, self.num_inputs, self.form, self.level = num_outputs, num_inputs, form, level
        panels = -(-num_outputs // PANEL)
        self.by_triton = level is None and triton.serves(torch.device(device)) and triton.is_installed()
        self.by_triton = self.by_triton and panels * form.panel_bytes(num_inputs) < 2**31  # the kernel counts in int32
        self.packed = in_huge_pages(torch.empty(panels, form.panel_bytes(num_inputs), dtype=torch.uint8, device=device))
        self.scales = torch.empty(num_outputs, device=device) if form.bits == 8 else None
        self.bias = None if bias is None else bias.to(device, torch.float32, copy=True).contiguous()
        self.panels_per_chunk = max(1, CHUNK // (PANEL * num_inputs))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed weight and its scales."""
        return {"packed": self.packed} | ({} if self.scales is None else {"scales": self.scales})

    @classmethod
    def filled(
        cls,
        num_outputs: int,
        num_inputs: int,
        form: Format,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        level: int | None,
    ) -> Quantized | None:
        """A linear from the tensors of an equal linear, which are copied; None if their shapes or dtypes do not fit."""
        made = cls.__new__(cls)
        made._prepare(num_outputs, num_inputs, form, bias, level, "cpu")
        if {name: (x.shape, x.dtype) for name, x in tensors.items()} != {
            name: (x.shape, x.dtype) for name, x in made.tensors.items()
        }:
            return None
        for name, tensor in made.tensors.items():
            tensor.copy_(tensors[name])
        return made

    def _pack(self, weight: Tensor, row: int) -> None:
        weight = torch.nn.functional.pad(weight.float(), (0, 0, 0, -len(weight) % PANEL))
        if self.scales is not None:
            numbers, scales = quantize_rows(weight)
            packed = pack_rows(numbers)
            self.scales[row : row + len(scales)] = scales[: self.num_outputs - row]
        else:
            packed = pack_groups(*quantize_groups(weight, self.form))
        self.packed[row // PANEL : row // PANEL + len(packed)] = packed

    def _pack_codes(self, codes: Codes, step: int) -> int:
        """Pack codes as they are. Returns the number of rows."""
        form, groups = self.form, self.num_inputs // (self.form.group_size or self.num_inputs)
        rows, inputs = codes.codes.shape
        if inputs != self.num_inputs or codes.scales.shape != (rows, groups) or codes.order is not None:
            raise ValueError(
                f"codes must be [{self.num_outputs}, {self.num_inputs}] in their own order with {groups} scales a row, got "
                f"{list(codes.codes.shape)} and {list(codes.scales.shape)}"
            )
        if (codes.zeros is None) != form.symmetric:
            raise ValueError("codes and format must both be symmetric, or both have zeros")
        for row in range(0, rows, step):
            piece = codes.rows(row, row + step)
            pad = (0, 0, 0, -len(piece.codes) % PANEL)
            zeros = piece.zeros if piece.zeros is None else torch.nn.functional.pad(piece.zeros, pad)
            numbers, factors = torch.nn.functional.pad(piece.codes, pad), torch.nn.functional.pad(piece.scales, pad)
            packed, scales = pack_codes(Codes(numbers, factors, zeros), form)
            self.packed[row // PANEL : row // PANEL + len(packed)] = packed
            if self.scales is not None and scales is not None:
                self.scales[row : row + step] = scales[: rows - row]
        return rows

    def __call__(self, x: Tensor) -> Tensor:
        return self._in_c(x, x.dtype) if self.level is not None else self._without_c(x)

    def wide(self, x: Tensor) -> Tensor:
        """The same with y in float32: it is not rounded to x's dtype."""
        return self._in_c(x, torch.float32) if self.level is not None else self._without_c(x, torch.float32)

    def _in_c(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dtype: of y. float32, or that of x."""
        x = checked_inputs(x, self.num_inputs, DTYPES)
        rows, inputs = x.shape
        form = self.form
        words = -(-inputs // 4) * (1 if form.quantized else 4) + 2 * -(-inputs // form.input_group)
        y, scratch = x.new_empty(rows, self.num_outputs, dtype=dtype), torch.empty(rows, words)
        cpu.int_linear(
            x.data_ptr(),
            self.packed.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            rows,
            self.num_outputs,
            inputs,
            form.bits,
            form.input_group,
            form.symmetric,
            form.quantized,
            FLOATS if x.dtype == torch.float32 else FLOAT_OUTPUTS if dtype == torch.float32 else BF16,
            self.level,
            torch.get_num_threads(),
            UNIT,
        )
        return y

    def _without_c(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not self.by_triton or x.dtype not in triton.DTYPES:
            return self.reference(x, dtype)
        from pitlane.kernels.cuda.linear import linear

        return linear(x, self, dtype)

    def reference(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """The same in torch, in float32 or float64. With rounded inputs, sums of a group are exact: rows are independent.

        out_dtype: of y; None: that of x.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        pieces = self.packed.split(self.panels_per_chunk)
        y = torch.cat([product_ref(x, packed, self.num_inputs, self.form, dtype) for packed in pieces], 1)
        y = y[:, : self.num_outputs] * (UNIT if self.scales is None else self.scales)
        return (y if self.bias is None else y + self.bias).to(out_dtype or x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """The rows [T, K] of an 8-bit weight in float32, for an embedding. index: [T]."""
        assert self.scales is not None, "4 bits serve no embedding"
        if self.level is not None and index.dtype == torch.int64 and index.is_contiguous():
            y = torch.empty(len(index), self.num_inputs)
            addresses = (tensor.data_ptr() for tensor in (self.packed, self.scales, index, y))
            cpu.int_rows(*addresses, len(index), self.num_outputs, self.num_inputs)
            return y
        lines = self.packed.view(len(self.packed), -1, PANEL, 4)[index // PANEL, :, index % PANEL]
        return (lines.flatten(1)[:, : self.num_inputs].float() - 128) * self.scales[index][:, None]


def _pieces(weights: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Cut the rows of several weights, one after another, into pieces of `rows` rows; the last piece may be shorter."""
    kept: list[Tensor] = []
    for weight in weights:
        while len(weight):
            count = rows - sum(map(len, kept))
            kept.append(weight[:count])
            weight = weight[count:]
            if sum(map(len, kept)) == rows:
                yield kept[0] if len(kept) == 1 else torch.cat(kept)
                kept = []
    if kept:
        yield kept[0] if len(kept) == 1 else torch.cat(kept)


# ---- where the kernel serves


def unavailable(form: Format, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel in C cannot serve; None if it can. Compares it with the reference, once per format and dtype."""
    if device.type != "cpu" or dtype not in DTYPES:
        return f"it is for bfloat16 and float32 on a CPU, not for {str(dtype).removeprefix('torch.')} on {device.type}"
    forced = os.environ.get("PITLANE_CPU_KERNELS", LEVELS[-1])
    if forced not in LEVELS:
        return f"PITLANE_CPU_KERNELS = {forced} is unknown; use {', '.join(LEVELS)}"
    if cpu is None:
        return MISSING
    agrees = _agrees(form, dtype, int(cpu.int_level()))
    return None if agrees else "its result differs from the reference on this machine; please report it"


def chosen_level(form: Format, num_inputs: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The level of the kernel in C to use. None: Triton computes, or torch; on a CPU with a warning."""
    if triton.serves(device):
        reason = triton.unsupported(dtype, device)
        if reason is not None:
            _warn(form.bits, reason)
        return None
    reason = unavailable(form, dtype, device)
    if reason is None and num_inputs > MAX_INPUTS:
        reason = f"a linear has {num_inputs} inputs, and the kernel takes up to {MAX_INPUTS}"
    if reason is None:
        return int(cpu.int_level())
    if device.type == "cpu" and dtype in DTYPES:
        _warn(form.bits, reason)
    return None


def state(form: Format) -> str:
    """The level that serves bfloat16 on this machine, or why torch computes."""
    reason = unavailable(form, torch.bfloat16, torch.device("cpu"))
    return f"torch computes: {reason}" if reason else f"ok by {LEVELS[cpu.int_level()]}"


@cache
def _warn(bits: int, reason: str) -> None:
    log.warning("int%d: torch computes, not the kernel in C: %s", bits, reason)


@cache
def _agrees(form: Format, dtype: torch.dtype, level: int) -> bool:
    """Whether kernel and reference agree on a small linear with an incomplete panel, for rows that fill tiles and do not."""
    generator = torch.Generator().manual_seed(0)
    inputs = 102 if form.bits == 8 else 3 * form.group_size
    weight = torch.randn(37, inputs, generator=generator)
    linear = Quantized(37, inputs, form, [weight], torch.randn(37, generator=generator), level)
    for rows in (1, 2, 3, 5, 13, 50):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        expected = linear.reference(x).float()
        if not torch.allclose(linear(x).float(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4):
            return False
    return True
