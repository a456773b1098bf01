"""The metadata of a GGUF model as a config, and the models that are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES, TensorInfo
from pitlane.engine.models.gguf.config import config_values, dtype_of, generation_values
from pitlane.engine.models.gguf.conversion import Conversion
from pitlane.engine.models.gguf.header import Value
from pitlane.engine.models.gguf.keys import shortest
from pitlane.engine.models.gguf.reader import GGUF

FILE = Path("model.gguf")
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (300, 64),
    "output_norm.weight": (64,),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64),
    "blk.0.ffn_down.weight": (64, 96),
}
VALUES: dict[str, Value] = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "rope.freq_base": 500000.0,
    "rope.dimension_count": 16,
}


def info(name: str, shape: tuple[int, ...], number: int = 0) -> TensorInfo:
    return TensorInfo(name, shape, BLOCK_TYPES[number], FILE, 0)


def model(
    architecture: object = "llama",
    shapes: dict[str, tuple[int, ...]] | None = None,
    without: tuple[str, ...] = (),
    **changes: Any,
) -> GGUF:
    """A model without a file. changes: metadata of the architecture, with `__` for `.`; `tokenizer__...`: of the tokenizer."""
    values = VALUES | {name.replace("__", "."): value for name, value in changes.items()}
    metadata = {
        name if name.startswith("tokenizer.") else f"{architecture}.{name}": value
        for name, value in values.items()
        if name not in without
    }
    named = {name: shape for name, shape in (SHAPES | (shapes or {})).items() if name not in without}
    return GGUF(
        (FILE,), {"general.architecture": architecture, **metadata}, {name: info(name, named[name]) for name in named}
    )  # type: ignore[dict-item]


def test_values() -> None:
    assert config_values(model(tokenizer__ggml__eos_token_id=2, tokenizer__ggml__bos_token_id=1)) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }


def test_defaults_of_llama_cpp() -> None:
    values = config_values(model(without=("attention.head_count_kv", "rope.freq_base", "rope.dimension_count")))
    assert (values["num_key_value_heads"], values["rope_theta"], values["head_dim"]) == (4, 10000.0, 16)


def test_a_number_per_layer() -> None:
    assert config_values(model(attention__head_count_kv=[2, 2, 2]))["num_key_value_heads"] == 2


def test_gemma3() -> None:
    window = {"attention__sliding_window": 512, "attention__key_length": 16}
    values = config_values(model("gemma3", **window))
    assert values["architectures"] == ["Gemma3ForCausalLM"]
    assert (values["sliding_window"], values["sliding_window_pattern"], values["rope_local_base_freq"]) == (512, 6, 1e4)
    assert values["query_pre_attn_scalar"] == 16
    assert config_values(model("gemma3", block_count=62, **window))["query_pre_attn_scalar"] == 64 // 4
    assert config_values(model("gemma3"))["sliding_window_pattern"] == 1, "all layers are full"
    newer = {"attention__sliding_window_pattern": [True, False], "rope__freq_base_swa": 5000.0}
    values = config_values(model("gemma3", block_count=2, **window, **newer))
    assert values["layer_types"] == ["sliding_attention", "full_attention"]
    assert values["rope_local_base_freq"] == 5000.0
    assert config_values(model("gemma3", **window, attention__sliding_window_pattern=4))["sliding_window_pattern"] == 4


def test_a_window_makes_a_llama_a_mistral() -> None:
    values = config_values(model(attention__sliding_window=32))
    assert (values["model_type"], values["sliding_window"]) == ("mistral", 32)
    for window in (0, 128, 4096):
        assert config_values(model(attention__sliding_window=window))["model_type"] == "llama"


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ("F32", "float32"),
        ("F16", "float16"),
        ("F32 F16", "float16"),
        ("BF16", "bfloat16"),
        ("F16 BF16", "bfloat16"),
        ("Q4_1 Q8_0", "bfloat16"),
        ("F16 Q4_K", "bfloat16"),
    ],
)
def test_dtype_of_the_model(types: str, dtype: str) -> None:
    numbers = {block.name: number for number, block in BLOCK_TYPES.items()}
    tensors = {kind: info(kind, (256, 256), numbers[kind]) for kind in types.split()}
    assert dtype_of(tensors | {"norm": info("norm", (256,))}) == dtype


def test_ids_that_end_an_answer() -> None:
    def ends(**tokenizer: Any) -> Any:
        named = {f"tokenizer__ggml__{name}": value for name, value in tokenizer.items()}
        return generation_values(model(**named)).get("eos_token_id")

    assert ends() is None
    assert ends(eos_token_id=7) == [7]
    assert ends(eos_token_id=7, eot_token_id=9, eom_token_id=7) == [7, 9]
    texts = ["<eos>", "<end_of_turn>", "<|im_end|>", "<|endoftext|>"]
    assert ends(eos_token_id=0, tokens=texts, token_type=[3, 3, 1, 3]) == [0, 3, 1], "ordinary tokens end nothing"


def test_shortest_decimal() -> None:
    for value in (1e-5, 1e-6, 5e5, 1.0, 0.1, 1e-12, 3e38):
        assert shortest(float(np.float32(value))) == value
    assert shortest(0.1) == 0.1 and shortest(1e300) == 1e300


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba' is not supported; known: llama, qwen2, .*gemma3"),
    "no architecture": ({"architecture": None}, "architecture None is not supported"),
    "architecture of another type": ({"architecture": [1]}, r"architecture \[1\] is not supported"),
    "experts": ({"expert_count": 8}, "a model of 8 experts is not supported"),
    "part of a head": ({"rope__dimension_count": 8}, "RoPE on 8 of 16 values of a head is not supported"),
    "size of values": ({"attention__value_length": 32}, "keys with 16 values and of values with 32"),
    "window of some layers": (
        {"architecture": "qwen2", "attention__sliding_window": 32},
        "sliding window .* for qwen2",
    ),
    "scale of scores": ({"attention__scale": 0.5}, "attention.scale 0.5 is not supported"),
    "scale of logits": ({"logit_scale": 2.0}, "logit_scale 2.0 is not supported"),
    "soft cap": ({"architecture": "gemma3", "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "longrope": ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, "RoPE kind 'longrope' .* length"),
    "unknown scaling": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__yarn_log_multiplier": 0.1},
        "llama.rope.scaling.yarn_log_multiplier 0.1 is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_supported(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=f"^model.gguf: .*{words}") as error:
        Conversion.of(model(**changes))
    assert str(error.value).isprintable()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"without": ("block_count",)}, "lacks the metadata key llama.block_count; download it again"),
    "no epsilon": (
        {"without": ("attention.layer_norm_rms_epsilon",)},
        "lacks .*llama.attention.layer_norm_rms_epsilon",
    ),
    "no embedding": ({"without": ("token_embd.weight",)}, "lacks the tensor token_embd.weight"),
    "text for a number": ({"block_count": "2"}, "llama.block_count must be a whole number, got '2'; correct it"),
    "fraction": ({"block_count": 2.5}, "llama.block_count must be a whole number, got 2.5"),
    "bool": ({"block_count": True}, "llama.block_count must be a whole number, got True"),
    "other numbers by layer": ({"attention__head_count_kv": [2, 4]}, r"must be the same for all layers, got \[2, 4\]"),
    "no numbers": ({"attention__head_count_kv": []}, r"must be the same for all layers, got \[\]"),
    "layers": ({"block_count": 2**40}, "num_hidden_layers must be .* got 1099511627776"),
    "heads": ({"attention__head_count": 0, "without": ("rope.dimension_count",)}, "num_attention_heads must be"),
    "epsilon": ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps must be .* got nan"),
    "epsilon of text": ({"attention__layer_norm_rms_epsilon": "x"}, "must be a number, got 'x'"),
    "base": ({"rope__freq_base": -2.0}, "llama.rope.freq_base must be between 1 and 1e.15, got -2.0"),
    "base nan": ({"rope__freq_base": float("nan")}, "llama.rope.freq_base must be between"),
    "factor": ({"rope__scaling__type": "linear", "rope__scaling__factor": -2.0}, "rope_scaling.factor must be"),
    "id of the end": ({"tokenizer__ggml__eos_token_id": -5}, "eos_token_id.* must be"),
    "id of the end, text": ({"tokenizer__ggml__eot_token_id": "x"}, "tokenizer.ggml.eos_token_id.* must be"),
    "tokens": ({"tokenizer__ggml__tokens": ["x"] * 301}, "has 301 tokens, but token_embd.weight has 300 rows"),
    "unknown tensor": ({"shapes": {"blk.0.ffn_gate_exps.weight": (4, 96, 64)}}, "does not have: blk.0.ffn_gate_exps"),
    "tensor of another layer": ({"shapes": {"blk.7.attn_q.weight": (64, 64)}}, "does not have: blk.7.attn_q.weight"),
    "tensor of another family": ({"shapes": {"blk.0.attn_q_norm.weight": (16,)}}, "does not have: blk.0.attn_q_norm"),
    "no tensor": ({"without": ("blk.0.ffn_up.weight",)}, r"lacks tensors: model\.layers\.0\.mlp\.up_proj\.weight"),
    "shape": ({"shapes": {"blk.0.attn_k.weight": (64, 64)}}, r"attn_k.weight must be \(32, 64\) .* got \(64, 64\)"),
    "transposed": ({"shapes": {"blk.0.ffn_down.weight": (96, 64)}}, r"must be \(64, 96\) by the metadata"),
    "dimensions": ({"shapes": {"output_norm.weight": (1, 64)}}, r"must be \(64,\) by the metadata, got \(1, 64\)"),
    "embedding of three dimensions": ({"shapes": {"token_embd.weight": (3, 100, 64)}}, "lacks the tensor token_embd"),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_contradict_themselves(case: str) -> None:
    changes, words = WRONG[case]
    with pytest.raises(ModelError, match=f"^model.gguf.*{words}") as error:
        Conversion.of(model(**changes))
    assert str(error.value).isprintable() and len(str(error.value)) < 500
