"""Finds the reader for the `quantization_config` of a `config.json`. Reads no tensor.

A method has the name of its module, with - for _. The module needs torch, so it is imported only for a checkpoint of its method.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import read_json, short

if TYPE_CHECKING:
    from pitlane.engine.models.quantized.spec import Reader

KEYS = ("quantization_config", "compression_config")
METHODS = ("awq", "compressed-tensors", "fp8", "gptq")


def reader_of(raw: Mapping[str, Any]) -> Reader | None:
    """Return the reader for a `config.json`; None: the checkpoint is not quantized. Raises UnsupportedModel or ModelError."""
    quantization = next((raw[key] for key in KEYS if raw.get(key)), None)
    if quantization is None:
        return None
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
    known = ", ".join(METHODS)
    if method not in METHODS or not isinstance(quantization, dict):
        raise UnsupportedModel(
            f"the checkpoint is quantized ({short(method)}), which is not supported; known methods: {known}; "
            "use one of them or the unquantized model"
        )
    module = import_module(f"pitlane.engine.models.quantized.{method.replace('-', '_')}")
    reader: Reader = module.Reader(method, quantization)
    return reader


def reader_in(folder: Path) -> Reader | None:
    """Return the reader for the `config.json` of a folder; None: the checkpoint is not quantized."""
    file = folder / "config.json"
    try:
        return reader_of(read_json(file))
    except UnsupportedModel:
        raise
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None
