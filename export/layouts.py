"""For each format: the tensors of a quantized linear, and the `quantization_config` of the checkpoint.

Shapes: N outputs, K inputs, G groups. `engine/models/quantized/` describes and reads the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pitlane.export.errors import ExportError
from pitlane.formats import AWQ_ORDER, pack
from pitlane.kernels.quantize_math import Codes


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantize. group_size 0: a scale serves all inputs of an output. format: a key of FORMATS, or gguf."""

    method: str = "rtn"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    format: str = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Layout:
    """A format of checkpoints.

    bits: the widths that the format can hold. tensors: takes codes, settings and the dtype of the model; returns the tensors of a
    linear by the last part of their names. config: takes the settings and the names of the dense linears; returns the
    `quantization_config`. unit: outputs and inputs must be a multiple of it.
    """

    bits: tuple[int, ...]
    tensors: Callable[[Codes, Settings, torch.dtype], dict[str, Tensor]]
    config: Callable[[Settings, Sequence[str]], dict[str, Any]]
    unit: int = 1


def unsigned(codes: Codes, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and zeros as numbers n, z in [0, 2^bits): uint8 [N, K] and [N, G]. W = scale * (n - z)."""
    if codes.zeros is not None:
        return codes.codes.to(torch.uint8), codes.zeros.to(torch.uint8)
    middle = 2 ** (bits - 1)
    zeros = torch.full(codes.scales.shape, middle, dtype=torch.uint8)
    return (codes.codes.to(torch.int16) + middle).to(torch.uint8), zeros


def _compressed_tensors(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers, zeros = unsigned(codes, settings.bits)
    tensors = {
        "weight_packed": pack(numbers, settings.bits),
        "weight_scale": codes.scales.to(scale_dtype(settings, dtype)),
        "weight_shape": torch.tensor(numbers.shape, dtype=torch.int64),
    }
    if codes.zeros is not None:
        tensors["weight_zero_point"] = pack(zeros.T.contiguous(), settings.bits).T.contiguous()
    return tensors


def _compressed_tensors_config(settings: Settings, dense: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "group" if settings.group_size else "channel",
        "group_size": settings.group_size or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _gptq(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    bits, (numbers, zeros) = settings.bits, unsigned(codes, settings.bits)
    if codes.zeros is None:
        zeros = zeros - 1  # version 1 of the layout
    inputs = numbers.shape[1]
    return {
        "qweight": pack(numbers, bits).T.contiguous(),
        "qzeros": pack(zeros.T.contiguous(), bits),
        "scales": codes.scales.T.to(scale_dtype(settings, dtype)).contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (settings.group_size or inputs),
    }


def _gptq_config(settings: Settings, dense: Sequence[str]) -> dict[str, Any]:
    """Version 1 adds 1 to a stored zero, so it cannot hold the zero 0 of asymmetric codes; version 2 can."""
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size or -1,
        "desc_act": False,
        "sym": settings.symmetric,
        "checkpoint_format": "gptq" if settings.symmetric else "gptq_v2",
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "modules_to_not_convert": list(dense),
    }


def _awq(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers, zeros = unsigned(codes, settings.bits)
    return {
        "qweight": pack(_interleaved(numbers.T), settings.bits),
        "qzeros": pack(_interleaved(zeros.T), settings.bits),
        "scales": codes.scales.T.to(scale_dtype(settings, dtype)).contiguous(),
    }


def _interleaved(numbers: Tensor) -> Tensor:
    """[R, N] -> [R, N]: orders every eight outputs as AWQ's words do."""
    words: Tensor = numbers.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)]
    return words.flatten(1).contiguous()


def _awq_config(settings: Settings, dense: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(dense) or None,
    }


METHODS = ("rtn", "gptq", "awq")


FORMATS: Mapping[str, Layout] = {
    "compressed-tensors": Layout((2, 3, 4, 5, 6, 7, 8), _compressed_tensors, _compressed_tensors_config),
    "gptq": Layout((2, 3, 4, 8), _gptq, _gptq_config, unit=32),
    "awq": Layout((4,), _awq, _awq_config, unit=8),
}


def scale_dtype(settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """The dtype of stored scales: float16 in GPTQ and AWQ. The library of compressed-tensors casts scales to the model's dtype."""
    return dtype if settings.format == "compressed-tensors" else torch.float16


def check(settings: Settings) -> Layout:
    """Return the layout of the settings. Raises ExportError."""
    if settings.format not in FORMATS:
        raise ExportError(f"unknown format {settings.format!r}; known: {', '.join([*FORMATS, 'gguf'])}")
    if settings.method not in METHODS:
        raise ExportError(f"unknown method {settings.method!r}; known: {', '.join(METHODS)}")
    layout = FORMATS[settings.format]
    if settings.bits not in layout.bits:
        known = ", ".join(map(str, layout.bits))
        raise ExportError(f"{settings.format} holds {known} bits, got {settings.bits}; choose other --bits or --format")
    if settings.format == "awq" and not settings.group_size:
        raise ExportError("awq needs groups of inputs; give --group-size 128, 64 or 32")
    return layout


def check_linear(name: str, outputs: int, inputs: int, settings: Settings) -> None:
    """Raises ExportError if a linear [outputs, inputs] does not fit the settings."""
    size, unit = settings.group_size or inputs, FORMATS[settings.format].unit
    if inputs % size:
        fitting = [str(other) for other in (128, 64, 32) if inputs % other == 0]
        raise ExportError(
            f"--group-size must divide the inputs of every linear, got {size} and {inputs} ({name}); "
            f"try {' or '.join([*fitting, '0 (a scale per output)'])}"
        )
    if outputs % unit or inputs % unit:
        raise ExportError(
            f"{settings.format} needs outputs and inputs that are multiples of {unit}, got {outputs} and {inputs} ({name}); "
            "choose --format compressed-tensors"
        )


def plugins_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """The plugins that make the recipe of a method, with their options; {}: the method needs no recipe. Raises ExportError."""
    if settings.method == "rtn":
        return {}
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
