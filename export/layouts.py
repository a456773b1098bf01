"""For each format: the tensors of a quantized linear, and the `quantization_config` of the checkpoint.

Shapes: N outputs, K inputs, G groups. `engine/models/quantized/` describes and reads the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pitlane.export.compressed import config_of_all, float8, int8, packed
from pitlane.export.errors import ExportError
from pitlane.export.settings import COMPRESSED, Settings, check_method, scale_dtype, unsigned
from pitlane.formats import AWQ_ORDER, pack
from pitlane.kernels.quantize_math import Codes


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


FORMATS: Mapping[str, Layout] = {
    COMPRESSED: Layout((2, 3, 4, 5, 6, 7, 8), packed, config_of_all),
    "gptq": Layout((2, 3, 4, 8), _gptq, _gptq_config, unit=32),
    "awq": Layout((4,), _awq, _awq_config, unit=8),
}
LAYOUTS: Mapping[str, Layout] = {  # methods with a layout of their own in compressed-tensors
    "smoothquant": Layout((8,), int8, config_of_all),
    "fp8": Layout((8,), float8, config_of_all),
}


def check(settings: Settings) -> Layout:
    """Return the layout of the settings. Raises ExportError."""
    if settings.format not in FORMATS:
        raise ExportError(f"unknown format {settings.format!r}; known: {', '.join([*FORMATS, 'gguf'])}")
    check_method(settings)
    layout = FORMATS[settings.format]
    if settings.format == COMPRESSED:
        layout = LAYOUTS.get(settings.method, layout)
    if settings.method == "mixed":
        return layout
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
