"""Shapes of known models, for `random:<preset>`: measure speed and run tests without a download.

A preset has the values of the model's `config.json`. The dtype is bfloat16 and the weights are random, so the text is
noise, but time and memory are those of the model. The tables in the documentation use `llama-1b` (1.10 B parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import ModelConfig, RopeConfig

LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
QWEN25: dict[str, Any] = {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
SMOLLM3: dict[str, Any] = {
    "no_rope_layers": frozenset(range(3, 36, 4)),
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


def _model(
    family: str, hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int, theta: float, **more: Any
) -> ModelConfig:
    return ModelConfig(
        architecture=f"{family}ForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        vocab_size=vocab,
        **{
            "head_dim": hidden // heads[0],
            "max_position": 8192,
            "rms_norm_eps": 1e-5,
            "rope": RopeConfig(theta),
            **more,
        },
    )


def _llama32(hidden: int, inner: int, layers: int, heads: tuple[int, int]) -> ModelConfig:
    rope = RopeConfig(500000.0, "llama3", {"factor": 32.0, **LLAMA31})
    more: dict[str, Any] = {"rope": rope, "max_position": 131072, "tie_word_embeddings": True}
    return _model("Llama", hidden, inner, layers, heads, 128256, 500000.0, **more)


def _qwen3(hidden: int, inner: int, layers: int, heads: tuple[int, int]) -> ModelConfig:
    more: dict[str, Any] = {"head_dim": 128, "max_position": 40960, "rms_norm_eps": 1e-6, "qk_norm": True}
    return _model("Qwen3", hidden, inner, layers, heads, 151936, 1e6, tie_word_embeddings=True, **more)


PRESETS: Mapping[str, ModelConfig] = {
    "tiny": _model("Llama", 128, 256, 2, (2, 1), 512, 10000.0, max_position=4096),
    "llama-1b": _model("Llama", 2048, 8192, 16, (32, 8), 32000, 500000.0),
    "llama-1b-draft": _model("Llama", 512, 1536, 2, (8, 2), 32000, 500000.0),  # a draft model for llama-1b
    "llama-8b": _model("Llama", 4096, 14336, 32, (32, 8), 128256, 500000.0),
    "llama-3.2-1b": _llama32(2048, 8192, 16, (32, 8)),
    "llama-3.2-3b": _llama32(3072, 8192, 28, (24, 8)),
    "qwen2.5-0.5b": _model("Qwen2", 896, 4864, 24, (14, 2), 151936, 1e6, max_position=32768, **QWEN25),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, (16, 8)),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, (16, 8)),
    "qwen3-4b": _qwen3(2560, 9728, 36, (32, 8)),
    "smollm2-135m": _model("Llama", 576, 1536, 30, (9, 3), 49152, 1e5, tie_word_embeddings=True),
    "smollm2-360m": _model("Llama", 960, 2560, 32, (15, 5), 49152, 1e5, tie_word_embeddings=True),
    "smollm3-3b": _model("SmolLM3", 2048, 11008, 36, (16, 4), 128256, 5e6, max_position=65536, **SMOLLM3),
    "mistral-7b": _model("Mistral", 4096, 14336, 32, (32, 8), 32768, 1e6, max_position=32768),
}
ALIASES: Mapping[str, str] = {"qwen-0.5b": "qwen2.5-0.5b"}


def preset(name: str) -> ModelConfig:
    """Return the config of a preset. Its tokenizer is `byte_tokenizer.py`, whose id 257 ends an answer."""
    config = PRESETS.get(ALIASES.get(name, name))
    if config is None:
        raise ModelError(f"unknown preset {name!r}; known: {', '.join(sorted((*PRESETS, *ALIASES)))}")
    return replace(config, eos_token_ids=(257,))
