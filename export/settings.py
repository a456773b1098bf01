"""How to quantize: the settings of a run, the methods, and the plugins that make their recipes. Knows no layout of a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pitlane.export.errors import ExportError
from pitlane.kernels.fp8 import GRANULARITIES
from pitlane.kernels.quantize_math import Codes

METHODS = ("rtn", "gptq", "awq", "mixed", "smoothquant", "fp8")
BITS = {"smoothquant": 8, "fp8": 8}  # methods with a fixed number of bits
COMPRESSED = "compressed-tensors"
SMALLEST_ON_KERNELS = 4.5  # bits of `mixed` from which every linear has 4 or 8 bits; below, also 2, 3, 5 and 6 bits


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantize. group_size 0: a scale serves all inputs of an output. format: a key of FORMATS, or gguf.

    granularity: only fp8; a linear, an output or a block shares a scale. budget: only mixed; mean bits per weight of
    all linears together. Both are empty for other methods. The method mixed ignores `bits` and `group_size`.
    """

    method: str = "rtn"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    format: str = "compressed-tensors"
    granularity: str = ""
    budget: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The settings that the method has."""
        values = asdict(self)
        if not self.granularity:
            del values["granularity"]
        if not self.budget:
            del values["budget"]
        return values


def unsigned(codes: Codes, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and zeros as numbers n, z in [0, 2^bits): uint8 [N, K] and [N, G]. W = scale * (n - z)."""
    if codes.zeros is not None:
        return codes.codes.to(torch.uint8), codes.zeros.to(torch.uint8)
    middle = 2 ** (bits - 1)
    zeros = torch.full(codes.scales.shape, middle, dtype=torch.uint8)
    return (codes.codes.to(torch.int16) + middle).to(torch.uint8), zeros


def scale_dtype(settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """The dtype of stored scales: float16 in GPTQ and AWQ. The library of compressed-tensors casts scales to the model's dtype."""
    return dtype if settings.format == "compressed-tensors" else torch.float16


def check_method(settings: Settings) -> None:
    """Raises ExportError if the method does not support the settings."""
    method, bits = settings.method, BITS.get(settings.method)
    if method not in METHODS:
        raise ExportError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if bits and settings.bits != bits:
        raise ExportError(f"{method} has {bits} bits, got {settings.bits}; leave --bits out")
    if bits and not settings.symmetric:
        raise ExportError(f"{method} has no zero points; leave --asymmetric out")
    if bits and settings.group_size and settings.format != "gguf":
        raise ExportError(f"{method} has no groups of inputs, got {settings.group_size}; leave --group-size out")
    if method == "fp8" and settings.granularity not in GRANULARITIES:
        known = ", ".join(GRANULARITIES)
        raise ExportError(f"the granularity of fp8 must be {known}, got {settings.granularity!r}")
    if method in ("mixed", "fp8") and settings.format != COMPRESSED:
        what = "linears of different bits" if method == "mixed" else "float8"
        raise ExportError(f"{settings.format} holds no {what}; choose --format {COMPRESSED}")


def of_linear(settings: Settings, grid: Sequence[int]) -> Settings:
    """The settings of a linear with the grid that mixed chose: bits, group_size, symmetric."""
    bits, group_size, symmetric = grid
    return replace(settings, bits=bits, group_size=group_size, symmetric=bool(symmetric), budget=0.0)


def plugins_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """The plugins that make the recipe of a method, with their options; {}: the method needs no recipe. Raises ExportError."""
    check_method(settings)
    if settings.method in ("rtn", "fp8"):
        return {}
    if settings.method == "smoothquant":
        return {"int8": {}, "smoothquant": {}}
    if settings.method == "mixed":
        formats = "kernels" if settings.budget >= SMALLEST_ON_KERNELS else "all"
        return {"mixed": {"bits": settings.budget, "formats": formats, "symmetric": settings.symmetric}}
    if settings.group_size not in (32, 64, 128):
        raise ExportError(
            f"{settings.method} needs groups of 32, 64 or 128, got {settings.group_size}; change --group-size"
        )
    grid = {"group_size": settings.group_size, "symmetric": settings.symmetric}
    if settings.method == "gptq":
        return {"gptq": {"bits": settings.bits, **grid}}
    if settings.bits != 4 and not (settings.symmetric and settings.bits < 4):
        raise ExportError(
            f"awq makes 4 bits, or 2 and 3 symmetric bits, got {settings.bits}; choose another --bits or --method"
        )
    return {"int4": grid, "awq": {"bits": settings.bits}}
