"""Configs in the spelling of transformers 4 and 5, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import ModelConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(folder: Path, generation: dict[str, Any] | None = None, without: str = "", **changes: Any) -> ModelConfig:
    raw = {key: value for key, value in (LLAMA | changes).items() if key != without}
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_both_spellings_read_alike(tmp_path: Path) -> None:
    old = read(tmp_path, torch_dtype="float16", rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    new = read(tmp_path, dtype="float16", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert old.rope == RopeConfig(5e5, "llama3", LLAMA3)
    assert old.dtype == "float16"


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, without="num_key_value_heads")
    assert (config.num_kv_heads, config.head_dim, config.rope, config.dtype) == (4, 16, RopeConfig(), "float32")
    assert config.windows == (None,) * 4
    assert config.attention_scale == 0.25
    assert not (config.attention_bias or config.output_bias or config.mlp_bias or config.qk_norm)


def test_end_of_text(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (2,)
    assert read(tmp_path, eos_token_id=[2, 3]).eos_token_ids == (2, 3)
    assert read(tmp_path, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert read(tmp_path, {"temperature": 1.0}).eos_token_ids == (2,)
    assert read(tmp_path, without="eos_token_id").eos_token_ids == ()


def test_biases_and_norms_by_architecture(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, architectures=["Qwen2ForCausalLM"])
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)
    llama = read(tmp_path, attention_bias=True)
    assert (llama.attention_bias, llama.output_bias) == (True, True)
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 128)


def test_windows(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=8).windows == (8,) * 4
    assert read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * 4
    qwen2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
    assert read(tmp_path, **qwen2, use_sliding_window=False).windows == (None,) * 4
    later = read(tmp_path, **qwen2, use_sliding_window=True, max_window_layers=3)
    assert later.windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert read(tmp_path, **qwen2, use_sliding_window=True, layer_types=types).windows == (8, None, 8, None)


def test_trained_exits(tmp_path: Path) -> None:
    assert read(tmp_path).exit_layers == ()
    assert read(tmp_path, num_hidden_layers=8, exit_layers=[4, 9]).exit_layers == (4,)


def test_layers_without_rope(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=["SmolLM3ForCausalLM"]).no_rope_layers == {3}
    given = read(tmp_path, architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, 0, 0, 1])
    assert given.no_rope_layers == {1, 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "length of the prompt", "yarn"]),
        ({"rope_scaling": {"type": "novel"}}, ["novel", "yarn"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["layer type"]),
        ({"partial_rotary_factor": 0.5}, ["0.5"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as error:
        read(tmp_path, **changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "many"}, ["hidden_size", "many"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_key_value_heads": 3}, ["4", "3"]),
        ({"rope_scaling": {"type": "yarn"}}, ["yarn", "factor"]),
        ({"rope_theta": "far"}, ["far"]),
        ({"architectures": None, "model_type": "bert"}, ["architecture", "LlamaForCausalLM"]),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read(tmp_path, **changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_key_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lacks vocab_size"):
        read(tmp_path, without="vocab_size")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path / "nowhere")
