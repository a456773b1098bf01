"""Small quantized checkpoints, packed bit by bit as the formats describe it, and the weights that they stand for.

Independent of the readers and writers of the project: a row of integers is one large Python integer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pitlane.engine.models.presets import config_json
from pitlane.engine.models.registry import resolve

MODEL = "random:tiny"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Array = np.ndarray[Any, Any]
Tensors = dict[str, Tensor]


def words(rows: Array, bits: int) -> Tensor:
    """Rows of integers -> int32 words, the first integer in the lowest bits."""
    packed = []
    for row in rows.tolist():
        number = sum(value << bits * place for place, value in enumerate(row))
        packed.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<i4"))
    return torch.from_numpy(np.stack(packed).copy())


@dataclass
class Case:
    """A format with settings. make: numbers [N, K], scales [N, G], zeros [N, G], groups [K] -> tensors by last part of the name."""

    config: dict[str, Any]
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    permuted: bool = False
    make: Callable[..., Tensors] = field(default=lambda **values: {})
    rows: int = 1
    is_float: bool = False
    scale_dtype: torch.dtype = torch.float16


def gptq(numbers: Array, scales: Tensor, zeros: Array, groups: Array, bits: int, version: int) -> Tensors:
    return {
        "qweight": words(numbers, bits).T.contiguous(),
        "qzeros": words((zeros - (version == 1)).T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(groups).int(),
    }


def awq(numbers: Array, scales: Tensor, zeros: Array, groups: Array, bits: int) -> Tensors:
    def interleaved(rows: Array) -> Array:
        return rows.reshape(len(rows), -1, 8)[..., list(AWQ_ORDER)].reshape(len(rows), -1)

    return {
        "qweight": words(interleaved(numbers.T), 4),
        "qzeros": words(interleaved(zeros.T), 4),
        "scales": scales.T.contiguous(),
    }


def packed(
    numbers: Array, scales: Tensor, zeros: Array, groups: Array, bits: int, symmetric: bool, permuted: bool
) -> Tensors:
    tensors = {
        "weight_packed": words(numbers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(numbers.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if permuted:
        tensors["weight_g_idx"] = torch.from_numpy(groups).int()
    return tensors


def in_bytes(numbers: Array, scales: Tensor, zeros: Array, groups: Array, symmetric: bool) -> Tensors:
    tensors = {"weight": torch.from_numpy(numbers - 128).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
    return tensors


def compressed(bits: int, strategy: str, format: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": None, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _gptq(bits: int = 4, group: int = 32, symmetric: bool = True, permuted: bool = False, version: int = 1) -> Case:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": permuted,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Case(config, bits, group, symmetric, permuted, lambda **v: gptq(**v, bits=bits, version=version))


def _packed(bits: int = 4, group: int = 32, symmetric: bool = True, permuted: bool = False) -> Case:
    more = {"symmetric": symmetric, "group_size": None if group == -1 else group}
    more["actorder"] = "group" if permuted else None
    config = compressed(bits, "channel" if group == -1 else "group", **more)

    def make(**values: Any) -> Tensors:
        return packed(**values, bits=bits, symmetric=symmetric, permuted=permuted)

    return Case(config, bits, group, symmetric, permuted, make, scale_dtype=torch.bfloat16)


def _float(config: dict[str, Any], group: int, rows: int, name: str, shape: Sequence[int] | None = None) -> Case:
    def make(numbers: Tensor, scales: Tensor, **rest: Any) -> Tensors:
        return {"weight": numbers, name: scales if shape is None else scales[:1, :1].reshape(tuple(shape)).contiguous()}

    return Case(config, 8, group, rows=rows, is_float=True, make=make, scale_dtype=torch.float32)


MADE: dict[int, tuple[Case, Tensors, Tensors]] = {}  # by the id of a case: packing bit by bit takes a moment
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
CASES: dict[str, Case] = {
    "gptq": _gptq(),
    "gptq of 2 bits": _gptq(2, 64, symmetric=False),
    "gptq of 3 bits": _gptq(3),
    "gptq of 8 bits": _gptq(8, -1),
    "gptq in groups of 8 bits": _gptq(8, 32),
    "gptq with zero points": _gptq(4, 64, symmetric=False),
    "gptq version 2": _gptq(4, 128, symmetric=False, version=2),
    "gptq with act-order": _gptq(permuted=True),
    "gptq with act-order and zero points": _gptq(4, 64, symmetric=False, permuted=True, version=2),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        group=64,
        symmetric=False,
        make=lambda **v: awq(**v, bits=4),
    ),
    "compressed-tensors": _packed(),
    "compressed-tensors of 3 bits": _packed(3, 64),
    "compressed-tensors of 8 bits": _packed(8, -1),
    "compressed-tensors by output": _packed(4, -1),
    "compressed-tensors with zero points": _packed(4, 64, symmetric=False),
    "compressed-tensors with act-order": _packed(permuted=True),
    "compressed-tensors in bytes": Case(
        compressed(8, "channel", "int-quantized"), 8, -1, make=lambda **v: in_bytes(**v, symmetric=True)
    ),
    "compressed-tensors in bytes with zero points": Case(
        compressed(8, "channel", "int-quantized", symmetric=False),
        8,
        -1,
        symmetric=False,
        make=lambda **v: in_bytes(**v, symmetric=False),
    ),
    "compressed-tensors of float8": _float(
        compressed(8, "channel", "float-quantized", type="float"), -1, 1, "weight_scale"
    ),
    "compressed-tensors of float8 in blocks": _float(
        compressed(8, "block", "float-quantized", type="float", block_structure=[64, 32]), 32, 64, "weight_scale"
    ),
    "fp8 in blocks": _float({**FP8, "weight_block_size": [128, 128]}, 128, 128, "weight_scale_inv"),
    "fp8 in small blocks": _float({**FP8, "weight_block_size": [48, 64]}, 64, 48, "weight_scale_inv"),
    "fp8 with one scale": _float(FP8, -1, 10**6, "weight_scale", ()),
    "fp8 by output": _float(FP8, -1, 1, "weight_scale"),
}


def write(folder: Path, case: Case, edit: Callable[[Tensors], Any] = lambda tensors: None) -> Tensors:
    """Write a checkpoint of random numbers; return its dense weights by name, in float32. edit: changes the stored tensors."""
    if id(case) not in MADE:
        MADE[id(case)] = case, *_made(case)
    _, tensors, dense = MADE[id(case)]
    tensors = dict(tensors)
    edit(tensors)
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = config_json("tiny") | {"architectures": ["LlamaForCausalLM"], "quantization_config": case.config}
    (folder / "config.json").write_text(json.dumps(values))
    return dense


def _made(case: Case) -> tuple[Tensors, Tensors]:
    """The stored tensors of a model, and the dense weights of its quantized linears."""
    source, generator = resolve(MODEL), np.random.default_rng(0)
    tensors, dense = {}, {}
    for name in source.weights.names():  # type: ignore[attr-defined]
        weight = source.weights.get(name)
        if ".layers." not in name or weight.dim() != 2:
            tensors[name] = weight.clone()
            continue
        stored, dense[name] = linear(case, *weight.shape, generator)
        tensors |= {f"{name.removesuffix('weight')}{last}": tensor for last, tensor in stored.items()}
    return tensors, dense


def linear(case: Case, outputs: int, inputs: int, generator: np.random.Generator) -> tuple[Tensors, Tensor]:
    """The stored tensors of a linear, and its dense weight."""
    group = inputs if case.group == -1 else min(case.group, inputs)
    rows = min(case.rows, outputs)
    shape = -(-outputs // rows), -(-inputs // group)
    scales = torch.from_numpy(generator.uniform(0.5, 1.5, shape)).mul(2.0 ** (1 - case.bits) / inputs**0.5)
    groups = np.arange(inputs) // group
    if case.permuted:
        groups = generator.permutation(groups)
    lines = np.arange(outputs) // rows
    if case.is_float:
        scales = (scales / 16).to(case.scale_dtype)
        if rows == outputs and case.rows > 1000:
            scales = scales[:1, :1].expand(shape)
        numbers = torch.from_numpy(generator.normal(0, 100, (outputs, inputs))).to(torch.float8_e4m3fn)
        return case.make(numbers=numbers, scales=scales.contiguous()), numbers.float() * scales[lines][:, groups]
    scales = scales.to(case.scale_dtype)
    top = 2**case.bits
    integers = generator.integers(0, top, (outputs, inputs))
    zeros = np.full(shape, top // 2) if case.symmetric else generator.integers(1, top, shape)
    weight = torch.from_numpy(integers - zeros[lines][:, groups]).float() * scales.float()[lines][:, groups]
    return case.make(numbers=integers, scales=scales, zeros=zeros, groups=groups), weight
