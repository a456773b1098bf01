"""Checkpoints of compressed-tensors (llm-compressor): integers in words, integers in bytes, and float8.

pack-quantized: weight_packed int32 [N, ceil(K bits / 32)] with n = q + 2^(bits - 1), weight_scale [N, G], weight_shape [2]; with
zero points weight_zero_point int32 [ceil(N bits / 32), G], packed along the outputs; with `actorder` group weight_g_idx [K].
int-quantized and naive-quantized: weight int8 [N, K], weight_scale, weight_zero_point int8. float-quantized: weight float8 [N, K],
weight_scale. A scale serves the whole weight, an output (`channel`), a group, or a block. Activations stay in the model's dtype,
even if the config asks for rounded activations. Source: the package compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pitlane.engine.models.config_file import JsonFile
from pitlane.engine.models.quantized.bits import unpack, words_for
from pitlane.engine.models.quantized.fp8 import float8
from pitlane.engine.models.quantized.packing import PackedWeight, Packing
from pitlane.engine.models.quantized.spec import (
    FLOATS,
    BadTensor,
    Get,
    Spec,
    checked_bits,
    groups_of,
    pattern,
    refuse,
    whole_groups,
)

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "naive-quantized", "float-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
BITS = (2, 3, 4, 5, 6, 7, 8)
EXPRESSION = "re:"  # before a regular expression


class Weights(JsonFile):
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | None = None
    actorder: str | bool | None = None


class Group(JsonFile):
    targets: list[str]
    weights: dict[str, Any] | None = None
    format: str | None = None


class Config(JsonFile):
    format: str = "dense"
    config_groups: dict[str, dict[str, Any]] = Field(default_factory=dict)
    ignore: list[str] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class Targets:
    """Names linears: by `Linear`, the name, the end of the name, or `re:` and a regular expression."""

    def __init__(self, method: str, key: str, targets: Iterable[str]) -> None:
        self.names = [target for target in targets if not target.startswith(EXPRESSION)]
        self.patterns = [
            pattern(method, key, target, EXPRESSION) for target in targets if target.startswith(EXPRESSION)
        ]

    def names_linear(self, name: str) -> bool:
        has_name = any(target in ("Linear", name) or name.endswith(f".{target}") for target in self.names)
        return has_name or any(expression.match(name) for expression in self.patterns)


class Scheme:
    """How a config group stores its linears; `targets` names these linears."""

    def __init__(self, method: str, name: str, group: Group, default_format: str) -> None:
        where = f"quantization_config.config_groups.{name}"
        self.targets = Targets(method, "targets", group.targets)
        self.weights = Weights.of(group.weights or {}, f"{where}.weights")
        self.format = group.format or default_format
        weights = self.weights
        if self.format not in FORMATS:
            raise refuse(method, "format", self.format, ", ".join(FORMATS))
        if weights.type not in ("int", "float"):
            raise refuse(method, "type", weights.type, "int, float")
        checked_bits(method, weights.num_bits, (8,) if weights.type == "float" or self.format != PACKED else BITS)
        self.strategy = weights.strategy or ("tensor" if weights.group_size is None else "group")
        if weights.strategy is None and weights.group_size == -1:
            self.strategy = "channel"
        if self.strategy not in STRATEGIES:
            raise refuse(method, "strategy", self.strategy, ", ".join(STRATEGIES))
        block = weights.block_structure or []
        if self.strategy == "block" and (len(block) != 2 or min(block) < 1):
            raise refuse(method, "block_structure", weights.block_structure, "two numbers above 0")


class Reader:
    """quantization_config with `quant_method` compressed-tensors."""

    def __init__(self, method: str, raw: Mapping[str, Any]) -> None:
        self.method, self.config = method, Config.of(raw, "quantization_config")
        if (self.config.sparsity_config or {}).get("format", "dense") != "dense":
            raise refuse(method, "sparsity_config", self.config.sparsity_config, "dense")
        if (self.config.transform_config or {}).get("config_groups"):
            raise refuse(method, "transform_config", self.config.transform_config, "no transforms")
        groups = {name: Group.of(group, f"config_groups.{name}") for name, group in self.config.config_groups.items()}
        self.schemes = [Scheme(method, name, group, self.config.format) for name, group in groups.items()]
        self.ignored = Targets(method, "ignore", self.config.ignore or ())
        self.by_packing: dict[Packing, Scheme] = {}

    def packing_of(self, name: str, inputs: int) -> Packing | None:
        if self.ignored.names_linear(name):
            return None
        scheme = next((scheme for scheme in self.schemes if scheme.targets.names_linear(name)), None)
        if scheme is None:
            return None
        weights, size, rows = scheme.weights, inputs, 1
        if scheme.strategy == "group":
            size = whole_groups(self.method, weights.group_size or 0, inputs, name)
        elif scheme.strategy == "block":
            rows, size = weights.block_structure or (1, inputs)
        packing = Packing(
            f"{self.method} {scheme.format}",
            weights.num_bits,
            min(size, inputs),
            rows,
            weights.symmetric,
            weights.type == "float",
            weights.actorder in ("group", True),
        )
        self.by_packing[packing] = scheme
        return packing

    def specs(self, packing: Packing, outputs: int, inputs: int) -> Mapping[str, Spec]:
        scheme, bits = self.by_packing[packing], packing.bits
        shape = -(-outputs // packing.rows), -(-inputs // packing.group_size)
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        if scheme.strategy == "tensor":
            shapes = (), (1,), (1, 1)
        elif scheme.strategy == "channel":
            shapes = shape, (outputs,)
        specs: dict[str, Spec] = {}
        if scheme.format == PACKED:
            specs["weight_packed"] = Spec(("I32",), ((outputs, words_for(inputs, bits)),))
            specs["weight_shape"] = Spec(("I64", "I32"), ((2,),))
        else:
            specs["weight"] = Spec(("F8_E4M3",) if packing.is_float else ("I8",), ((outputs, inputs),))
        specs["weight_scale"] = Spec(FLOATS, shapes)
        if not packing.symmetric:
            packed = scheme.format == PACKED and scheme.strategy in ("group", "channel")
            zeros = Spec(("I32",), ((words_for(outputs, bits), shape[1]),)) if packed else Spec(("I8",), shapes)
            specs["weight_zero_point"] = zeros
        if packing.is_permuted:
            specs["weight_g_idx"] = Spec(("I32", "I64"), ((inputs,),))
        return specs

    def read(self, packing: Packing, outputs: int, inputs: int, get: Get) -> PackedWeight:
        scheme, bits = self.by_packing[packing], packing.bits
        count = -(-outputs // packing.rows)
        scales = get("weight_scale")
        scales = scales.reshape(-1, scales.shape[-1] if scales.dim() == 2 else 1).expand(count, -1)
        if packing.is_float:
            return PackedWeight(packing, float8(get), scales)
        middle, zeros = 2 ** (bits - 1), None
        if scheme.format == PACKED:
            shape = tuple(get("weight_shape").tolist())
            if shape != (outputs, inputs):
                raise BadTensor(f"weight_shape must be {(outputs, inputs)} by config.json, got {shape}")
            numbers = unpack(get("weight_packed"), bits, inputs)
        else:
            numbers = (get("weight").to(torch.int16) + middle).to(torch.uint8)
        if not packing.symmetric:
            zeros = _zeros(packing, outputs, get("weight_zero_point"))
        groups = groups_of(packing, inputs, get, "weight_g_idx") if packing.is_permuted else None
        return PackedWeight(packing, numbers, scales, zeros, groups)


def _zeros(packing: Packing, outputs: int, stored: Tensor) -> Tensor:
    """The zeros of every output [N, G]. stored: a zero per weight, per output, per group or per block."""
    if stored.dtype == torch.int32:
        return unpack(stored.T.contiguous(), packing.bits, outputs).T.to(torch.int16)
    zeros = stored.reshape(-1, stored.shape[-1] if stored.dim() == 2 else 1).to(torch.int16)
    if packing.rows > 1:
        zeros = zeros[torch.arange(outputs) // packing.rows]
    shifted: Tensor = zeros.expand(outputs, -1) + 2 ** (packing.bits - 1)
    return shifted
