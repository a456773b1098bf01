"""Shapes of known models, for `random:<preset>`: measure speed and run tests without a download.

A preset has the values of the model's `config.json`. The dtype is bfloat16 and the weights are random, so the text is
noise, but time and memory are those of the model. The tables in the documentation use `llama-1b` (1.10 B parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.families.core import parse_config

LLAMA32_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32: dict[str, Any] = {
    "rope_scaling": LLAMA32_ROPE,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
QWEN25: dict[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
QWEN3: dict[str, Any] = {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
SMOLLM3: dict[str, Any] = {"max_position_embeddings": 65536, "rms_norm_eps": 1e-6}
MISTRAL: dict[str, Any] = {"max_position_embeddings": 32768, "sliding_window": None}
GEMMA3: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
TIED = {"tie_word_embeddings": True}


def _model(
    family: str, hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int, theta: float, **more: Any
) -> dict[str, Any]:
    values = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "rope_theta": theta,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    return values | more


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tiny": _model("llama", 128, 256, 2, (2, 1), 512, 10000.0, max_position_embeddings=4096),
    "llama-1b": _model("llama", 2048, 8192, 16, (32, 8), 32000, 500000.0),
    "llama-1b-draft": _model("llama", 512, 1536, 2, (8, 2), 32000, 500000.0),  # a draft model for llama-1b
    "llama-8b": _model("llama", 4096, 14336, 32, (32, 8), 128256, 500000.0),
    "llama-3.2-1b": _model("llama", 2048, 8192, 16, (32, 8), 128256, 500000.0, **LLAMA32),
    "llama-3.2-3b": _model("llama", 3072, 8192, 28, (24, 8), 128256, 500000.0, **LLAMA32),
    "qwen2.5-0.5b": _model("qwen2", 896, 4864, 24, (14, 2), 151936, 1e6, **QWEN25),
    "qwen3-0.6b": _model("qwen3", 1024, 3072, 28, (16, 8), 151936, 1e6, **QWEN3),
    "qwen3-1.7b": _model("qwen3", 2048, 6144, 28, (16, 8), 151936, 1e6, **QWEN3),
    "qwen3-4b": _model("qwen3", 2560, 9728, 36, (32, 8), 151936, 1e6, **QWEN3),
    "smollm2-135m": _model("llama", 576, 1536, 30, (9, 3), 49152, 1e5, **TIED),
    "smollm2-360m": _model("llama", 960, 2560, 32, (15, 5), 49152, 1e5, **TIED),
    "smollm3-3b": _model("smollm3", 2048, 11008, 36, (16, 4), 128256, 5e6, **SMOLLM3),
    "mistral-7b": _model("mistral", 4096, 14336, 32, (32, 8), 32768, 1e6, **MISTRAL),
    "gemma3-270m": _model("gemma3_text", 640, 2048, 18, (4, 1), 262144, 1e6, **GEMMA3),
    "gemma3-1b": _model("gemma3_text", 1152, 6912, 26, (4, 1), 262144, 1e6, **GEMMA3),
}
PRESETS: Mapping[str, DecoderConfig] = {name: parse_config(values) for name, values in CONFIGS.items()}
ALIASES: Mapping[str, str] = {"qwen-0.5b": "qwen2.5-0.5b"}


def preset(name: str) -> DecoderConfig:
    """Return the config of a preset. Its tokenizer is `byte_tokenizer.py`, whose id 257 ends an answer."""
    return replace(PRESETS[_known(name)], eos_token_ids=(257,))


def config_json(name: str) -> dict[str, Any]:
    """Return the values of a preset's `config.json`."""
    return dict(CONFIGS[_known(name)])


def _known(name: str) -> str:
    name = ALIASES.get(name, name)
    if name not in PRESETS:
        raise ModelError(f"unknown preset {name!r}; known: {', '.join(sorted((*PRESETS, *ALIASES)))}")
    return name
