"""The formats of compressed-tensors: integers in words, integers in bytes, and float8; and their `quantization_config`.

Shapes: N outputs, K inputs, G groups. `engine/models/quantized/compressed_tensors.py` describes and reads the layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pitlane.export.settings import Settings, scale_dtype, unsigned
from pitlane.formats import pack
from pitlane.kernels.fp8 import BLOCK
from pitlane.kernels.quantize_math import Codes


def packed(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers, zeros = unsigned(codes, settings.bits)
    tensors = {
        "weight_packed": pack(numbers, settings.bits),
        "weight_scale": codes.scales.to(scale_dtype(settings, dtype)),
        "weight_shape": torch.tensor(numbers.shape, dtype=torch.int64),
    }
    if codes.zeros is not None:
        tensors["weight_zero_point"] = pack(zeros.T.contiguous(), settings.bits).T.contiguous()
    return tensors


def int8(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": codes.codes, "weight_scale": codes.scales.to(scale_dtype(settings, dtype))}


def float8(codes: Codes, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    """A scale per linear is stored as [1], a scale per output as [N, 1], a scale per block as [N / 128, K / 128]."""
    scales = codes.scales.to(scale_dtype(settings, dtype))
    if settings.granularity == "tensor":
        scales = scales[0]
    elif settings.granularity == "block":
        scales = scales[::BLOCK]
    return {"weight": codes.codes, "weight_scale": scales.contiguous()}


def config_of_all(settings: Settings, dense: Sequence[str]) -> dict[str, Any]:
    return compressed_tensors_config({settings: ["Linear"]}, dense)


def compressed_tensors_config(targets: Mapping[Settings, Sequence[str]], dense: Sequence[str]) -> dict[str, Any]:
    """The config of linears with several settings. targets: the names of the linears; `Linear` names all linears."""
    groups = {f"group_{index}": _scheme(settings, names) for index, (settings, names) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": groups["group_0"]["format"],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(settings: Settings, targets: Sequence[str]) -> dict[str, Any]:
    """A config group. smoothquant asks for inputs of 8 bits, rounded with a scale per token."""
    granularity, form, inputs = settings.granularity, "pack-quantized", None
    if granularity:
        form = "float-quantized"
    elif settings.method == "smoothquant":
        form, inputs = "int-quantized", _arguments(8, strategy="token", dynamic=True)
    weights = _arguments(
        settings.bits,
        type="float" if granularity else "int",
        symmetric=settings.symmetric,
        strategy=granularity or ("group" if settings.group_size else "channel"),
        group_size=settings.group_size or None,
        block_structure=[BLOCK, BLOCK] if granularity == "block" else None,
        observer="minmax",
    )
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }


def _arguments(bits: int, **more: Any) -> dict[str, Any]:
    values = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": None,
        "dynamic": False,
    }
    return values | {"actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {}} | more
