"""FP8 checkpoints: weights in float8 (e4m3), W = scale * n.

The weight is float8 [N, K], with `weight_scale_inv` [ceil(N / rows), ceil(K / columns)] for blocks of `weight_block_size`, or with
`weight_scale` for the whole weight ([] or [1]) or for every output ([N], [N, 1]). Despite its name, `weight_scale_inv` multiplies.
Activations stay in the model's dtype: Pitlane ignores a stored `input_scale`. Source: FP8 formats, https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pitlane.engine.models.config_file import JsonFile
from pitlane.engine.models.quantized.packing import PackedWeight, Packing
from pitlane.engine.models.quantized.spec import FLOATS, BadTensor, Get, Spec, refuse

FORMAT = "e4m3"


class Config(JsonFile):
    fmt: str | None = None
    weight_block_size: list[int] | None = None
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None


class Reader:
    """quantization_config with `quant_method` fp8."""

    def __init__(self, method: str, raw: Mapping[str, Any]) -> None:
        self.method, self.config = method, Config.of(raw, "quantization_config")
        if (self.config.fmt or FORMAT) != FORMAT:
            raise refuse(method, "fmt", self.config.fmt, FORMAT)
        block = self.config.weight_block_size
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise refuse(method, "weight_block_size", block, "two numbers above 0")

    def packing_of(self, name: str, inputs: int) -> Packing | None:
        config = self.config
        if any(part in name for part in (*(config.modules_to_not_convert or ()), *(config.ignored_layers or ()))):
            return None
        rows, columns = config.weight_block_size or (1, inputs)
        return Packing(self.method, 8, min(columns, inputs), rows, is_float=True)

    def specs(self, packing: Packing, outputs: int, inputs: int) -> Mapping[str, Spec]:
        weight = Spec(("F8_E4M3",), ((outputs, inputs),))
        if self.config.weight_block_size is None:
            return {"weight": weight, "weight_scale": Spec(FLOATS, ((), (1,), (outputs,), (outputs, 1)))}
        shape = -(-outputs // packing.rows), -(-inputs // packing.group_size)
        return {"weight": weight, "weight_scale_inv": Spec(FLOATS, (shape,))}

    def read(self, packing: Packing, outputs: int, inputs: int, get: Get) -> PackedWeight:
        scales = get("weight_scale" if self.config.weight_block_size is None else "weight_scale_inv")
        if self.config.weight_block_size is None:
            scales = scales.reshape(-1, 1).expand(outputs, 1)
        return PackedWeight(packing, float8(get), scales)


def float8(get: Get) -> torch.Tensor:
    """The stored weight. Raises BadTensor for NaN."""
    weight = get("weight")
    if bool((weight.view(torch.uint8) & 0x7F).eq(0x7F).any()):
        raise BadTensor("weight holds values that are no numbers; download the model again")
    return weight
