"""Gemma 3, the text decoder: norms with weight 1 + w before and after attention and MLP, norms of query and key heads.

A layer is full or sliding (`layer_types`, else every `sliding_window_pattern`-th layer is full). Sliding layers have a RoPE base of
their own; scaled RoPE is for full layers. `max_position_embeddings` is the context with scaled RoPE. The checkpoint calls
the norm after attention `post_attention_layernorm`, the canonical name of the norm before the MLP. Source: arXiv:2503.19786
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import ConfigFile, Size, Theta, short
from pitlane.engine.models.families.common import check_activation, check_length, decoder_config
from pitlane.engine.models.families.family import Family
from pitlane.engine.models.rope_config import RopeConfig, rope_of

MODEL_TYPE = "gemma3_text"
STORED = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


class Gemma3File(ConfigFile):
    """The keys of `config.json` that only Gemma 3 has."""

    hidden_activation: str | None = None
    query_pre_attn_scalar: float = Field(256.0, gt=0, le=2**24)
    sliding_window_pattern: Size = 6
    rope_local_base_freq: Theta | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = None


def parse(raw: Mapping[str, Any]) -> DecoderConfig:
    file = Gemma3File.of(raw)
    check_activation(file.hidden_activation, ("gelu_pytorch_tanh",), MODEL_TYPE)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(file, key):
            raise UnsupportedModel(
                f"{MODEL_TYPE} with {key} {getattr(file, key)} is not supported: attention is causal, without soft caps"
            )
    full, local = _ropes(file)
    return decoder_config(
        file,
        MODEL_TYPE,
        head_dim=256,
        tied=True,
        norm_offset=1.0,
        output_norms=True,
        activation="gelu_tanh",
        embedding_multiplier=file.hidden_size**0.5,
        qk_norm=True,
        query_pre_attn_scalar=file.query_pre_attn_scalar,
        rope=full,
        local_rope=local,
        windows=_windows(file),
    )


def stored_name(canonical: str) -> str:
    return ".".join(STORED.get(part, part) for part in canonical.split("."))


GEMMA3 = Family("Gemma3ForCausalLM", MODEL_TYPE, "Gemma 3 (text)", parse, stored_name)


def _ropes(file: Gemma3File) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of full layers and of sliding layers. As in transformers 5, `rope_scaling` overrides values of `rope_parameters`."""
    given = file.rope_parameters or {}
    parts = {kind: given.get(kind) or {} for kind in ("full_attention", "sliding_attention")}
    unknown = given.keys() - parts.keys()
    if unknown or not all(isinstance(part, dict) for part in parts.values()):
        raise ModelError(
            f"rope_parameters must be an object with {' and '.join(parts)}, got {short(given)}; correct it"
        )
    full = parts["full_attention"] | (file.rope_scaling or {})
    name = "rope_scaling" if file.rope_scaling else "rope_parameters.full_attention"
    local = parts["sliding_attention"]
    return (
        rope_of(file, full, name, file.rope_theta or 1e6),
        rope_of(file, local, "rope_parameters.sliding_attention", file.rope_local_base_freq or 1e4),
    )


def _windows(file: Gemma3File) -> tuple[int | None, ...]:
    layers = range(file.num_hidden_layers)
    window = file.sliding_window if "sliding_window" in file.model_fields_set else 4096
    if file.layer_types is None:
        sliding = [bool((layer + 1) % file.sliding_window_pattern) for layer in layers]
    else:
        check_length("layer_types", file.layer_types, len(layers))
        kinds = {"full_attention": False, "sliding_attention": True}
        for index, kind in enumerate(file.layer_types):
            if kind not in kinds:
                raise UnsupportedModel(
                    f"layer_types[{index}] {short(kind)} is not supported; known: {', '.join(kinds)}"
                )
        sliding = [kinds[kind] for kind in file.layer_types]
    if window is None and any(sliding):
        raise ModelError("sliding_window must be a number of tokens for sliding layers, got None; correct it")
    return tuple(window if is_sliding else None for is_sliding in sliding)
