"""Broken checkpoints of every format: one line that names the tensor and the file, before a request is served."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane.engine.errors import ModelError, UnsupportedModel
from tests.engine.models.quantized.checkpoints import CASES, Tensors, linear, write
from tests.engine.models.quantized.test_readers import opened

MODULE = "model.layers.1.mlp.down_proj"
SMALL = ("g_idx", "weight_g_idx", "weight_shape")


def parts_of_case(name: str) -> list[str]:
    import numpy as np

    return list(linear(CASES[name], 128, 256, np.random.default_rng(0))[0])


EACH_TENSOR = [(name, part) for name in CASES for part in parts_of_case(name)]
each_tensor = pytest.mark.parametrize(("name", "part"), EACH_TENSOR, ids=[f"{a}-{b}" for a, b in EACH_TENSOR])


def refused(folder: Path, *words: str, kind: type[ModelError] = ModelError, reads: bool = False) -> None:
    """The folder is refused in one line with these words, when it is opened or when the linear is read."""
    with pytest.raises(kind) as error:
        source = opened(folder)
        if reads:
            source.weights.get(f"{MODULE}.weight")
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    assert all(word in message for word in words), message


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{part}"] = change(tensors[f"{MODULE}.{part}"])

    return edit


def is_optional(name: str, part: str) -> bool:
    """A checkpoint without act-order needs no g_idx."""
    return part == "g_idx" and not CASES[name].permuted


@each_tensor
def test_a_missing_tensor(name: str, part: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], edit=lambda tensors: tensors.pop(f"{MODULE}.{part}"))
    if is_optional(name, part):
        assert opened(tmp_path).packings
    else:
        refused(tmp_path, f"lacks {MODULE}.{part}", "model.safetensors")


@each_tensor
def test_a_tensor_of_another_shape(name: str, part: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], edit=changed(part, lambda tensor: torch.cat([tensor.reshape(-1)] * 3)[:-1].clone()))
    refused(tmp_path, f"{MODULE}.{part} must be (", "got (", "model.safetensors")


@each_tensor
def test_a_tensor_of_another_dtype(name: str, part: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], edit=changed(part, lambda tensor: torch.zeros(tensor.shape, dtype=torch.int16)))
    refused(tmp_path, f"{MODULE}.{part} must be", "got I16", "model.safetensors")


SCALES = [(name, part) for name, part in EACH_TENSOR if "scale" in part]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "part"), SCALES)
def test_a_scale_that_is_no_number(name: str, part: str, number: float, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], edit=changed(part, lambda scales: torch.full_like(scales, number)))
    refused(tmp_path, f"a scale of {MODULE}", "model.safetensors", reads=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_float])
def test_a_float8_that_is_no_number(name: str, tmp_path: Path) -> None:
    write(
        tmp_path,
        CASES[name],
        edit=changed("weight", lambda weight: torch.full_like(weight.float(), float("nan")).to(weight.dtype)),
    )
    refused(tmp_path, f"{MODULE}.weight holds values that are no numbers", "model.safetensors", reads=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.permuted])
def test_groups_that_do_not_exist(name: str, tmp_path: Path) -> None:
    part = next(part for part in parts_of_case(name) if part.endswith("g_idx"))
    write(tmp_path, CASES[name], edit=changed(part, lambda groups: groups + 1000))
    refused(tmp_path, f"{MODULE}.{part} must name each", "model.safetensors", reads=True)


def test_groups_that_the_config_does_not_announce(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq"], edit=changed("g_idx", lambda groups: groups.flip(0)))
    refused(tmp_path, f"{MODULE}.g_idx permutes", "desc_act", "model.safetensors", reads=True)


@pytest.mark.parametrize(
    ("name", "part", "way"),
    [("gptq", "qzeros", "set sym to false"), ("compressed-tensors", "weight_shape", "by config")],
)
def test_values_that_contradict_the_config(name: str, part: str, way: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], edit=changed(part, lambda tensor: tensor + 1))
    refused(tmp_path, f"{MODULE}.{part} must be", way, "model.safetensors", reads=True)


def test_zeros_that_awq_does_not_announce(tmp_path: Path) -> None:
    case = copy.deepcopy(CASES["awq"])
    case.config["zero_point"] = False
    write(tmp_path, case)
    refused(tmp_path, f"{MODULE}.qzeros must be 8", "zero_point", reads=True)


def edited(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a config with another value for a key, wherever the key stands."""
    text = json.loads(json.dumps(config))

    def change(values: dict[str, Any]) -> None:
        if key in values:
            values[key] = value
        for inner in values.values():
            if isinstance(inner, dict):
                change(inner)

    change(text)
    assert text != config
    return dict(text)


def with_config(tmp_path: Path, name: str, key: str, value: Any) -> Path:
    write(tmp_path, CASES[name])
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] = edited(values["quantization_config"], key, value)
    file.write_text(json.dumps(values))
    return tmp_path


GROUPED = [name for name, case in CASES.items() if case.group not in (-1,) and not case.is_float]


@pytest.mark.parametrize("name", GROUPED)
def test_another_group_size(name: str, tmp_path: Path) -> None:
    part = next(part for part in parts_of_case(name) if "scale" in part or part == "qzeros")
    refused(
        with_config(tmp_path, name, "group_size", 16), ".self_attn.q_proj." + part, "groups of 16", "model.safetensors"
    )


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("size", [48, 0, -2])
def test_a_group_size_that_divides_no_linear(name: str, size: int, tmp_path: Path) -> None:
    refused(with_config(tmp_path, name, "group_size", size), f"got {size} and 128", "q_proj", "config.json")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_float])
@pytest.mark.parametrize("bits", [1, 9, None])
def test_bits_that_no_format_has(name: str, bits: int | None, tmp_path: Path) -> None:
    key = "num_bits" if "config_groups" in CASES[name].config else "bits"
    kind = UnsupportedModel if bits else ModelError
    refused(with_config(tmp_path, name, key, bits), "bits", str(bits), kind=kind)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_float and case.bits == 4])
def test_other_bits_than_those_of_the_files(name: str, tmp_path: Path) -> None:
    if name == "awq":
        refused(with_config(tmp_path, name, "bits", 8), "8", "known bits: 4", kind=UnsupportedModel)
        return
    key = "num_bits" if "config_groups" in CASES[name].config else "bits"
    refused(with_config(tmp_path, name, key, 8), "q_proj.", "must be (", "8 bits", "model.safetensors")


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("gptq", "quant_method", "novel", ["'novel'", "awq, compressed-tensors, fp8, gptq"]),
        ("gptq", "checkpoint_format", "marlin", ["checkpoint_format", "'marlin'", "gptq, gptq_v2"]),
        ("awq", "version", "gemv", ["version", "'gemv'", "gemm"]),
        ("fp8 by output", "fmt", "e5m2", ["fmt", "'e5m2'", "e4m3"]),
        ("fp8 in blocks", "weight_block_size", [128], ["weight_block_size", "[128]"]),
        ("compressed-tensors", "format", "marlin-24", ["format", "'marlin-24'", "pack-quantized"]),
        ("compressed-tensors", "strategy", "tensor_group", ["strategy", "'tensor_group'"]),
        ("compressed-tensors", "type", "complex", ["type", "'complex'"]),
        ("compressed-tensors of float8 in blocks", "block_structure", [0, 0], ["block_structure [0, 0]", "above 0"]),
        ("compressed-tensors of float8 in blocks", "block_structure", [64, -1], ["block_structure [64, -1]"]),
        ("compressed-tensors", "targets", ["re:("], ["targets 're:('", "regular expressions (missing )"]),
        ("compressed-tensors", "ignore", ["lm_head", "re:*"], ["ignore 're:*'", "regular expressions (nothing"]),
    ],
)
def test_what_no_reader_knows(name: str, key: str, value: Any, words: list[str], tmp_path: Path) -> None:
    refused(with_config(tmp_path, name, key, value), *words, kind=UnsupportedModel)


@pytest.mark.parametrize("key", ["+:(", "-:a{99999999999}", "*"])
def test_a_rule_of_gptq_that_is_no_regular_expression(key: str, tmp_path: Path) -> None:
    case = copy.deepcopy(CASES["gptq"])
    case.config["dynamic"] = {key: {"bits": 8}}
    write(tmp_path, case)
    refused(tmp_path, f"dynamic '{key}'", "known: regular expressions (", kind=UnsupportedModel)


@pytest.mark.parametrize("name", CASES)
def test_a_truncated_file(name: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    refused(tmp_path, "truncated or damaged", "model.safetensors")


def test_a_config_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq"])
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for wrong in ("int4", ["gptq"], {"bits": 4}):
        file.write_text(json.dumps(values | {"quantization_config": wrong}))
        refused(tmp_path, "is not supported", kind=UnsupportedModel)
