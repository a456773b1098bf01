"""Gemma 3 (text) equals transformers on tiny random configs, in both spellings of `config.json`; and configs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig, RopeConfig
from pitlane.engine.models.families.core import read_config
from tests.engine.models.harness import Harness, load
from tests.engine.models.test_architectures import ATOL, RTOL, make, reference, tokens

GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPES = {FULL: {"rope_theta": 5000.0, **LINEAR}, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}
CASES: dict[str, dict[str, Any]] = {
    "pattern of 3": {},
    "pattern of 2": {"sliding_window_pattern": 2},
    "all layers full": {"sliding_window_pattern": 1},
    "all layers sliding": {"layer_types": [SLIDING] * 4},
    "layer types": {"layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "window longer than the prompt": {"sliding_window": 64},
    "scalar of head_dim": {"query_pre_attn_scalar": 16},
    "head of its own": {"tie_word_embeddings": False},
    "one KV head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "ropes by layer type": {"rope_parameters": ROPES},
}
OLD = {"rope_theta": 5000.0, "rope_local_base_freq": 50.0}
SPELLINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # keys to take out of config.json, and to put in
    "transformers 4": (("rope_parameters", "layer_types", "dtype"), {"sliding_window_pattern": 3, **OLD}),
    "transformers 4, scaled": (("rope_parameters",), {**OLD, "rope_scaling": LINEAR}),
    "no key for RoPE": (("rope_parameters",), {}),
    "scaling beside parameters": ((), {"rope_scaling": LINEAR}),
    "null": ((), {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None}),
    "model_type alone": (("architectures",), {}),
}


def read_raw(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


def assert_equals(theirs: Any, folder: Path) -> None:
    """A prompt in two chunks, longer than the window, then decoding; all logits are compared."""
    ours, ids = Harness(load(folder)), tokens(1)
    parts = [ours.run({0: ids[:21]}), ours.run({0: ids[21:33]}), *(ours.run({0: [token]}) for token in ids[33:])]
    torch.testing.assert_close(torch.cat(parts), reference(theirs, ids), atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    theirs = make("Gemma3", GEMMA | CASES[case], tmp_path)
    assert theirs.config.query_pre_attn_scalar in (24, 16)
    assert_equals(theirs, tmp_path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_read_as_transformers_reads_it(spelling: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make("Gemma3", GEMMA, tmp_path)
    without, changes = SPELLINGS[spelling]
    raw = {key: value for key, value in read_raw(tmp_path).items() if key not in without}
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    assert_equals(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), tmp_path)


def test_both_sequences_decode_in_one_batch(tmp_path: Path) -> None:
    theirs = make("Gemma3", GEMMA, tmp_path)
    ours, first, second = Harness(load(tmp_path)), tokens(1), tokens(2)
    parts = [ours.run({0: first[:20], 1: second[:20]}).split(20)]
    parts += [ours.run({0: [a], 1: [b]}).split(1) for a, b in zip(first[20:], second[20:], strict=True)]
    for seq, ids in enumerate((first, second)):
        logits = torch.cat([part[seq] for part in parts])
        torch.testing.assert_close(logits, reference(theirs, ids), atol=ATOL, rtol=RTOL)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    """The error is at most twice that of transformers in bfloat16."""
    theirs = make("Gemma3", GEMMA | {"initializer_range": 0.05}, tmp_path)
    ids = tokens(5)
    exact = reference(theirs, ids)
    ours = Harness(load(tmp_path, torch.bfloat16), dtype=torch.bfloat16).run({0: ids}).float()
    rounded = reference(theirs.bfloat16(), ids).float()
    assert float((ours - exact).abs().max()) <= 2 * float((rounded - exact).abs().max())


def test_names_of_the_checkpoint(tmp_path: Path) -> None:
    make("Gemma3", GEMMA, tmp_path)
    tensors, model = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    stored = {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
    for attribute, name in stored.items():
        weight = getattr(model.layers[2], attribute)
        torch.testing.assert_close(weight, tensors[f"model.layers.2.{name}.weight"] + 1)


def read(folder: Path, **changes: Any) -> DecoderConfig:
    values = {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    values |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 128} | changes))
    return read_config(folder)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.head_dim, config.tie_word_embeddings, config.attention_scale) == (256, True, 1 / 16)
    assert config.windows == (*[4096] * 5, None)
    assert [(group.layers, group.window) for group in config.kv_groups] == [((0, 1, 2, 3, 4), 4096), ((5,), None)]
    assert [config.rope_of(layer) for layer in (0, 5)] == [RopeConfig(1e4), RopeConfig(1e6)]
    assert read(tmp_path, rope_scaling=LINEAR).max_position == 128, "the context with scaled RoPE"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported: .*soft caps"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported: .*soft caps"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported: .*causal"),
        ({"hidden_activation": "relu"}, "relu.*known: gelu_pytorch_tanh"),
        ({"layer_types": [FULL] * 5 + ["mamba"]}, r"layer_types\[5\] 'mamba' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {FULL: {"rope_type": "dynamic", "factor": 2.0}}}, "dynamic.*stored keys"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words) as error:
        read(tmp_path, **changes)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be greater than 0"),
        ({"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar must be .*number"),
        ({"query_pre_attn_scalar": float("nan")}, "query_pre_attn_scalar must be a finite number"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ({"sliding_window_pattern": None}, "sliding_window_pattern must be"),
        ({"sliding_window": None}, "sliding_window must be a number of tokens for sliding layers"),
        ({"rope_local_base_freq": -1.0}, "rope_local_base_freq must be"),
        ({"attn_logit_softcapping": "no"}, "attn_logit_softcapping must be"),
        ({"layer_types": [FULL] * 5}, "layer_types must have an entry for each of 6 layers, got 5"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters must be an object with"),
        ({"rope_parameters": {FULL: 3}}, "rope_parameters must be an object with"),
        ({"rope_parameters": {FULL: {"factor": 2.0}}}, "rope_parameters.full_attention names no rope_type"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 0}}}, "rope_parameters.sliding_attention.rope_theta must be"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"config.json: .*{words}") as error:
        read(tmp_path, **changes)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
