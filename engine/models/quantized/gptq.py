"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

qweight int32 [K bits / 32, N], packed along the inputs. qzeros int32 [G, N bits / 32], packed along the outputs. scales [G, N].
g_idx int32 [K]: the group of every input; with `desc_act` an input may belong to any group. Version 1 (`checkpoint_format` gptq)
stores zero - 1, version 2 (gptq_v2) stores the zero. Source: GPTQ, https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pitlane.engine.models.config_file import JsonFile
from pitlane.engine.models.quantized.bits import unpack
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

BITS = (2, 3, 4, 5, 6, 7, 8)


class Config(JsonFile):
    bits: int | None = None
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str | None = None
    dynamic: dict[str, dict[str, Any]] | None = None


class Reader:
    """quantization_config with `quant_method` gptq."""

    def __init__(self, method: str, raw: Mapping[str, Any]) -> None:
        self.method, self.config = method, Config.of(raw, "quantization_config")
        checked_bits(method, self.config.bits, BITS)
        versions = method, f"{method}_v2"
        version = self.config.checkpoint_format or method
        if version not in versions:
            raise refuse(method, "checkpoint_format", version, ", ".join(versions))
        self.zero_offset = int(version == method)
        self.rules = [  # of GPTQModel; the first match counts
            (pattern(method, "dynamic", key, "+:", "-:"), key.startswith("-:"), changes)
            for key, changes in (self.config.dynamic or {}).items()
        ]

    def packing_of(self, name: str, inputs: int) -> Packing | None:
        config = self.config
        for expression, is_dense, changes in self.rules:
            if expression.match(name):
                if is_dense:
                    return None
                config = Config.of({**config.model_dump(), **changes}, "quantization_config.dynamic")
                break
        size = whole_groups(self.method, config.group_size, inputs, name)
        bits = checked_bits(self.method, config.bits, BITS)
        return Packing(self.method, bits, size, symmetric=config.sym, is_permuted=config.desc_act)

    def specs(self, packing: Packing, outputs: int, inputs: int) -> Mapping[str, Spec]:
        bits, groups = packing.bits, inputs // packing.group_size
        return {
            "qweight": Spec(("I32",), ((inputs * bits // 32, outputs),)),
            "qzeros": Spec(("I32",), ((groups, outputs * bits // 32),)),
            "scales": Spec(FLOATS, ((groups, outputs),)),
            "g_idx": Spec(("I32", "I64"), ((inputs,),), is_needed=packing.is_permuted),
        }

    def read(self, packing: Packing, outputs: int, inputs: int, get: Get) -> PackedWeight:
        bits, middle = packing.bits, 2 ** (packing.bits - 1)
        numbers = unpack(get("qweight").T.contiguous(), bits, inputs)
        zeros = unpack(get("qzeros"), bits, outputs).T.to(torch.int16) + self.zero_offset
        if packing.symmetric and bool((zeros != middle).any()):
            raise BadTensor(f"qzeros must be {middle} everywhere, because the config says sym; set sym to false")
        groups = groups_of(packing, inputs, get, "g_idx")
        return PackedWeight(packing, numbers, get("scales").T, None if packing.symmetric else zeros, groups)
