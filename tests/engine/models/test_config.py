"""Configs in the spelling of transformers 4 and 5, and features that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig, RopeConfig
from pitlane.engine.models.families.core import CORE_FAMILIES, read_config
from pitlane.engine.models.families.family import Family

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


def read(folder: Path, generation: dict[str, Any] | None = None, without: str = "", **changes: Any) -> DecoderConfig:
    raw = {key: value for key, value in (LLAMA | changes).items() if key != without}
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


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
    assert llama.mlp_bias is False and read(tmp_path, mlp_bias=True).mlp_bias is True
    assert read(tmp_path, architectures=["Qwen2ForCausalLM"], mlp_bias=True).mlp_bias is False, "its layers have none"
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 128)


@pytest.mark.parametrize("family", CORE_FAMILIES, ids=lambda family: family.model_type)
def test_every_family_is_known_by_both_names(family: Family, tmp_path: Path) -> None:
    config = read(tmp_path, architectures=[family.architecture], model_type="other")
    assert config.model_type == family.model_type
    assert config == read(tmp_path, architectures=None, model_type=family.model_type)


def test_windows(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=8).windows == (8,) * 4
    assert read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * 4
    qwen2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
    assert read(tmp_path, **qwen2, use_sliding_window=False).windows == (None,) * 4
    later = read(tmp_path, **qwen2, use_sliding_window=True, max_window_layers=3)
    assert later.windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert read(tmp_path, **qwen2, use_sliding_window=True, layer_types=types).windows == (8, None, 8, None)


def test_a_window_that_the_file_leaves_out_is_the_architecture_s_own(tmp_path: Path) -> None:
    for name in ("Qwen2", "Qwen3"):
        changes = {"architectures": [f"{name}ForCausalLM"], "use_sliding_window": True, "max_window_layers": 2}
        assert read(tmp_path, **changes).windows == (None, None, 4096, 4096)
        assert read(tmp_path, **changes, sliding_window=None).windows == (None,) * 4
    assert read(tmp_path, architectures=["SmolLM3ForCausalLM"], use_sliding_window=True).windows == (None,) * 4


def test_layer_types_agree_with_the_windows(tmp_path: Path) -> None:
    full, sliding = ["full_attention"] * 4, ["sliding_attention"] * 4
    assert read(tmp_path, layer_types=full).windows == (None,) * 4
    assert (
        read(tmp_path, architectures=["MistralForCausalLM"], layer_types=sliding, sliding_window=8).windows == (8,) * 4
    )
    for family, types in (("Llama", sliding), ("Mistral", full), ("Qwen2", sliding), ("Qwen3", [*full[:3], "mamba"])):
        with pytest.raises(UnsupportedModel, match=r"layer_types\[\d\] '\w+' is not supported: .*_attention"):
            read(tmp_path, architectures=[f"{family}ForCausalLM"], layer_types=types)
    with pytest.raises(ModelError, match="layer_types must have an entry for each of 4 layers, got 3"):
        read(tmp_path, layer_types=full[:3])


def test_rope_scaling_goes_before_rope_parameters(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    default = {"rope_type": "default", "rope_theta": 5000.0}
    both = read(tmp_path, rope_parameters=default, rope_scaling=yarn, rope_theta=20000.0)
    assert both == read(tmp_path, rope_scaling=yarn, rope_theta=20000.0)
    assert both.rope.kind == "yarn" and both.rope.theta == 20000.0
    for nothing in (None, {}):
        assert read(tmp_path, rope_parameters=default, rope_scaling=nothing).rope == RopeConfig(5000.0)
    beside = read(tmp_path, rope_scaling=yarn, original_max_position_embeddings=32)
    assert beside.rope.parameters["original_max_position_embeddings"] == 32


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0}, 1024),
        ({"type": "linear", "factor": 2}, 512),
        ({"type": "llama3", **LLAMA3}, 256),
        ({"type": "default"}, 256),
    ],
)
def test_a_scaled_rope_reaches_beyond_the_trained_length(rope: dict[str, Any], length: int, tmp_path: Path) -> None:
    assert read(tmp_path, rope_scaling=rope).max_position == length


def test_trained_exits(tmp_path: Path) -> None:
    assert read(tmp_path).exit_layers == ()
    assert read(tmp_path, num_hidden_layers=8, exit_layers=[4, 9]).exit_layers == (4,)


def test_layers_without_rope(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=["SmolLM3ForCausalLM"]).no_rope_layers == {3}
    config = read(tmp_path, architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, 0, 0, 1])
    assert config.no_rope_layers == {1, 2}


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
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, ["longrope", "length of the prompt"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ["part of the head"]),
        ({"head_dim": 15}, ["even", "15"]),
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
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "rope_type", "factor"]),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor", "1.0"]),
        ({"hidden_size": 63}, ["hidden_size", "63", "4"]),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, ["no_rope_layers", "4", "2"]),
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
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path / "nowhere")
