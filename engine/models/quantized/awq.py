"""AWQ checkpoints, as AutoAWQ writes them (`version` gemm).

qweight int32 [K, N / 8] and qzeros int32 [G, N / 8], packed along the outputs: bits 4 i to 4 i + 3 of a word hold output ORDER[i]
of eight outputs. scales [G, N]. Source: AWQ, https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pitlane.engine.models.config_file import JsonFile
from pitlane.engine.models.quantized.bits import unpack
from pitlane.engine.models.quantized.packing import PackedWeight, Packing
from pitlane.engine.models.quantized.spec import FLOATS, BadTensor, Get, Spec, checked_bits, refuse, whole_groups

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(ORDER.index(output) for output in range(8))  # output -> place in the word


class Config(JsonFile):
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None


class Reader:
    """quantization_config with `quant_method` awq."""

    def __init__(self, method: str, raw: Mapping[str, Any]) -> None:
        self.method, self.config = method, Config.of(raw, "quantization_config")
        config = self.config
        checked_bits(method, config.w_bit if config.bits is None else config.bits, (BITS,))
        if config.version.lower() != "gemm":
            raise refuse(method, "version", config.version, "gemm")

    def packing_of(self, name: str, inputs: int) -> Packing | None:
        if any(part in name for part in self.config.modules_to_not_convert or ()):
            return None
        size = self.config.q_group_size if self.config.group_size is None else self.config.group_size
        size = whole_groups(self.method, 128 if size is None else size, inputs, name)
        return Packing(self.method, BITS, size, symmetric=not self.config.zero_point)

    def specs(self, packing: Packing, outputs: int, inputs: int) -> Mapping[str, Spec]:
        groups = inputs // packing.group_size
        return {
            "qweight": Spec(("I32",), ((inputs, outputs // 8),)),
            "qzeros": Spec(("I32",), ((groups, outputs // 8),), is_needed=not packing.symmetric),
            "scales": Spec(FLOATS, ((groups, outputs),)),
        }

    def read(self, packing: Packing, outputs: int, inputs: int, get: Get) -> PackedWeight:
        numbers, zeros = _by_output(get("qweight"), outputs), None
        if not packing.symmetric:
            zeros = _by_output(get("qzeros"), outputs).to(torch.int16)
        elif _has(get, "qzeros") and bool((_by_output(get("qzeros"), outputs) != 8).any()):
            raise BadTensor("qzeros must be 8 everywhere, because the config says zero_point false; set it to true")
        return PackedWeight(packing, numbers, get("scales").T, zeros)


def _by_output(words: Tensor, outputs: int) -> Tensor:
    """int32 [R, N / 8] -> uint8 [N, R]."""
    numbers = unpack(words, BITS, outputs).view(len(words), -1, 8)
    return numbers[..., list(PLACES)].flatten(1).T.contiguous()


def _has(get: Get, name: str) -> bool:
    try:
        get(name)
    except KeyError:
        return False
    return True
