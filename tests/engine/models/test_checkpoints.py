"""Checkpoints that contradict their config give the result of transformers 5, or an error with the tensor and both shapes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models.families.core import read_config
from pitlane.engine.models.registry import resolve
from tests.engine.models.harness import Harness, load, shapes_of
from tests.engine.models.test_architectures import ATOL, RTOL, make, reference, tokens

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Any]
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.1.mlp."
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def write(folder: Path, family: str = "Llama", edit: Edit = lambda tensors: None, **config: Any) -> Path:
    """Write a model of zeros that fits its config. Then change its tensors with `edit` and its config.json with `**config`."""
    file, raw = folder / "config.json", CONFIG | {"architectures": [f"{family}ForCausalLM"]}
    file.write_text(json.dumps(raw))
    tensors = {name: torch.zeros(shape) for name, shape in shapes_of(read_config(folder)).items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    file.write_text(json.dumps(raw | config))
    return folder


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


def drop(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "bias of one number": ("Qwen2", put(f"{ATTENTION}q_proj.bias", 1), r"q_proj\.bias must be \(64,\) .* got \(1,\)"),
    "bias of two dimensions": ("Qwen2", put(f"{ATTENTION}k_proj.bias", 1, 32), r"k_proj\.bias must be .* \(1, 32\)"),
    "bias that the config does not allow": (
        "Llama",
        put(f"{ATTENTION}q_proj.bias", 64),
        r"not declare: .*q_proj\.bias",
    ),
    "bias that the family does not have": ("Qwen2", put(f"{ATTENTION}o_proj.bias", 64), r"not declare: .*o_proj\.bias"),
    "bias of the head": ("Llama", put("lm_head.bias", 300), r"not declare: lm_head\.bias"),
    "bias of a norm": ("Llama", put("model.norm.bias", 64), r"not declare: model\.norm\.bias"),
    "no bias": ("Qwen2", drop(f"{ATTENTION}v_proj.bias"), r"lacks model\.layers\.0\.self_attn\.v_proj\.bias"),
    "no head": ("Llama", drop("lm_head.weight"), r"lacks lm_head\.weight"),
    "no embedding": ("Llama", drop("model.embed_tokens.weight"), r"lacks model\.embed_tokens\.weight"),
    "norm of half": ("Llama", put("model.norm.weight", 32), r"model\.norm\.weight must be \(64,\) .* got \(32,\)"),
    "norm of one number": ("Llama", put("model.norm.weight", 1), r"model\.norm\.weight must be \(64,\) .* got \(1,\)"),
    "norm without dimensions": ("Llama", put("model.norm.weight"), r"model\.norm\.weight must be \(64,\) .* got \(\)"),
    "turned weight": ("Llama", put(f"{MLP}down_proj.weight", 96, 64), r"must be \(64, 96\) .* got \(96, 64\)"),
    "norm of a Qwen3 in a Llama": ("Llama", put(f"{ATTENTION}q_norm.weight", 16), r"not declare: .*q_norm\.weight"),
    "norm over all heads": (
        "Qwen3",
        put(f"{ATTENTION}q_norm.weight", 64),
        r"q_norm\.weight must be \(16,\) .* \(64,\)",
    ),
    "no q_norm": ("Qwen3", drop(f"{ATTENTION}q_norm.weight"), r"lacks .*q_norm\.weight"),
    "adapter": ("Llama", put(f"base_model.{ATTENTION}q_proj.lora_A.weight", 4, 64), r"not declare: .*lora_A\.weight"),
    "other prefix": ("Llama", without_prefix, r"lacks model\.embed_tokens\.weight, .* and \d+ more"),
    "control characters": ("Llama", put("a\x1b[31m", 1), r"not declare: a\\x1b\[31m"),
    "whole numbers": (
        "Llama",
        put(f"{MLP}up_proj.weight", 96, 64, dtype=torch.int64),
        r"up_proj\.weight must be .* I64",
    ),
    "truth values": ("Llama", put("model.norm.weight", 64, dtype=torch.bool), r"model\.norm\.weight must be .* BOOL"),
    "bytes": ("Llama", put(f"{MLP}up_proj.weight", 96, 64, dtype=torch.float8_e4m3fn), r"must be .* got F8_E4M3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_the_config_does_not_declare_is_refused(case: str, tmp_path: Path) -> None:
    family, edit, words = REFUSED[case]
    with pytest.raises(ModelError, match=words) as error:
        resolve(str(write(tmp_path, family, edit)))
    assert str(tmp_path) in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 1}, r"not declare: model\.layers\.1\..* and 6 more"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\..* and 6 more"),
        ({"vocab_size": 301}, r"embed_tokens\.weight must be \(301, 64\) by config\.json, got \(300, 64\)"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight must be \(64, 64\) by config\.json, got \(32, 64\)"),
        ({"attention_bias": True}, r"lacks .*q_proj\.bias.* and 5 more"),
        ({"mlp_bias": True}, r"lacks .*gate_proj\.bias.* and 3 more"),
        ({"tie_word_embeddings": True}, None),
    ],
)
def test_a_config_that_the_tensors_do_not_fit_is_refused(
    config: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    write(tmp_path, **config)
    if words is None:
        assert resolve(str(tmp_path)).config.tie_word_embeddings, "the head equals the embedding"
    else:
        with pytest.raises(ModelError, match=words):
            resolve(str(tmp_path))


# ---- what transformers 5 makes of a contradiction


def edited(folder: Path, edit: Edit, without: tuple[str, ...] = (), **config: Any) -> Any:
    """Write a folder with `make`, edit it, and return the model as transformers reads it."""
    from transformers import AutoModelForCausalLM

    file, weights = folder / "config.json", folder / "model.safetensors"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(raw | config))
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    edit(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def own_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()


def same_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def no_edit(tensors: Tensors) -> None:
    pass


TIED = {"tie_word_embeddings": True}
SMOLLM3 = {"pad_token_id": 0, "bos_token_id": 1}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
AS_TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Edit, tuple[str, ...], dict[str, Any]]] = {
    "tied, with a head of its own": ("Llama", TIED, own_head, (), {}),
    "tied, with the same head": ("Llama", TIED, same_head, (), {}),
    "silent, with a head of its own": ("SmolLM3", SMOLLM3, own_head, ("tie_word_embeddings",), {}),
    "buffers of RoPE": ("Llama", {}, put(f"{ATTENTION}rotary_emb.inv_freq", 8), (), {}),
    "bias flag that the family does not read": ("Qwen2", {}, no_edit, (), {"attention_bias": False, "mlp_bias": True}),
    "scaling beside parameters": ("Llama", {}, no_edit, (), {"rope_parameters": DEFAULT, "rope_scaling": YARN}),
    "no scaling beside parameters": ("Llama", {}, no_edit, (), {"rope_parameters": DEFAULT, "rope_scaling": {}}),
    "trained length beside the scaling": (
        "Llama",
        {},
        no_edit,
        ("rope_parameters",),
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    ),
    "longer than the trained length": (
        "Llama",
        {"max_position_embeddings": 32},
        no_edit,
        ("rope_parameters",),
        {"rope_scaling": YARN},
    ),
}


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_is_read_as_transformers_reads_it(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, options, edit, without, config = AS_TRANSFORMERS[case]
    make(family, options, tmp_path)
    theirs = edited(tmp_path, edit, without, **config)
    with caplog.at_level(logging.WARNING, "pitlane"):
        ours, ids = Harness(load(tmp_path)), tokens(5)
    torch.testing.assert_close(ours.run({0: ids}), reference(theirs, ids), atol=ATOL, rtol=RTOL)
    assert ("they differ; using the stored head" in caplog.text) == (edit is own_head)
    assert len(ids) <= ours.model.config.max_position


def test_memory_counts_a_head_of_its_own(tmp_path: Path) -> None:
    make("Llama", TIED, tmp_path)
    tied = resolve(str(tmp_path)).config
    edited(tmp_path, own_head)
    untied = resolve(str(tmp_path)).config
    assert shapes_of(untied).keys() - shapes_of(tied).keys() == {"lm_head.weight"}
