"""Llama, Mistral, Qwen2, Qwen3 and SmolLM3: one decoder layer, with other defaults for the keys that a `config.json` leaves out.

Tensor names are the canonical names. Differences: biases of q, k and v (Qwen2), norms of query and key heads (Qwen3), windows
(Mistral in all layers, Qwen in some), layers without RoPE (SmolLM3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import ConfigFile, short
from pitlane.engine.models.families.common import check_activation, check_length, decoder_config
from pitlane.engine.models.families.family import Family
from pitlane.engine.models.rope_config import longest, read_rope


@dataclass(frozen=True, slots=True)
class Defaults:
    """The defaults of transformers for keys that a `config.json` leaves out."""

    rope_theta: float = 10000.0
    tied: bool = False
    attention_bias: bool | None = None  # of q, k, v. None: read `attention_bias`, for q, k, v and output
    has_mlp_bias: bool = False  # the family reads the key `mlp_bias`
    qk_norm: bool = False
    head_dim: int | None = None
    window: int | None = None  # default of the key `sliding_window`
    switched_window: bool = False  # the window needs `use_sliding_window`, and applies to the layers of `layer_types`
    no_rope_interval: int | None = None


def parse(model_type: str, known: Defaults, raw: Mapping[str, Any]) -> DecoderConfig:
    file = ConfigFile.of(raw)
    check_activation(file.hidden_act, ("silu", "swish"), model_type)
    rope = read_rope(file, known.rope_theta)
    switches: dict[str, Any] = {
        "max_position": longest(file, rope),
        "mlp_bias": bool(file.mlp_bias) and known.has_mlp_bias,
        "qk_norm": known.qk_norm,
        "rope": rope,
        "no_rope_layers": _no_rope(file, known),
        "windows": _windows(file, known),
    }
    if known.attention_bias is not None:
        switches |= {"attention_bias": known.attention_bias, "output_bias": False}
    return decoder_config(file, model_type, head_dim=known.head_dim, tied=known.tied, **switches)


def _family(architecture: str, model_type: str, models: str, **defaults: Any) -> Family:
    return Family(architecture, model_type, models, partial(parse, model_type, Defaults(**defaults)))


LLAMA = _family("LlamaForCausalLM", "llama", "Llama 2 and 3, SmolLM2", has_mlp_bias=True)
MISTRAL = _family("MistralForCausalLM", "mistral", "Mistral", attention_bias=False, window=4096)
QWEN2 = _family("Qwen2ForCausalLM", "qwen2", "Qwen2 and 2.5", attention_bias=True, window=4096, switched_window=True)
QWEN3 = _family("Qwen3ForCausalLM", "qwen3", "Qwen3", qk_norm=True, head_dim=128, window=4096, switched_window=True)
SMOLLM3 = _family(
    "SmolLM3ForCausalLM",
    "smollm3",
    "SmolLM3",
    rope_theta=2000000.0,
    tied=True,
    has_mlp_bias=True,
    switched_window=True,
    no_rope_interval=4,
)


def _no_rope(raw: ConfigFile, known: Defaults) -> frozenset[int]:
    """The layers without RoPE. Despite its name, the key `no_rope_layers` holds 1 for a layer with RoPE."""
    if known.no_rope_interval is None:
        return frozenset()
    layers, uses = range(raw.num_hidden_layers), raw.no_rope_layers
    interval = raw.no_rope_layer_interval or known.no_rope_interval
    if uses is None:
        return frozenset(layer for layer in layers if (layer + 1) % interval == 0)
    if len(uses) < len(layers):
        raise ModelError(f"no_rope_layers must have an entry for each of {len(layers)} layers, got {len(uses)}")
    return frozenset(layer for layer in layers if not uses[layer])


def _windows(raw: ConfigFile, known: Defaults) -> tuple[int | None, ...]:
    """Windows by layer. Raises UnsupportedModel if `layer_types` contradicts the other keys."""
    layers = range(raw.num_hidden_layers)
    window = raw.sliding_window if "sliding_window" in raw.model_fields_set else known.window
    if known.switched_window:
        window = window if raw.use_sliding_window else None
        local = _local_layers(raw, known)
    else:
        window, local = window if known.window else None, set(layers)
    windows = tuple(window if layer in local else None for layer in layers)
    if raw.layer_types is not None:
        _check_types(raw.layer_types, windows)
    return windows


def _check_types(types: list[str], windows: tuple[int | None, ...]) -> None:
    check_length("layer_types", types, len(windows))
    for index, (kind, window) in enumerate(zip(types, windows, strict=True)):
        expected = "full_attention" if window is None else "sliding_attention"
        if kind != expected:
            raise UnsupportedModel(
                f"layer_types[{index}] {short(kind)} is not supported: the other keys of config.json give {expected}"
            )


def _local_layers(raw: ConfigFile, known: Defaults) -> set[int]:
    if raw.layer_types is not None:
        return {layer for layer, kind in enumerate(raw.layer_types) if kind == "sliding_attention"}
    if known.no_rope_interval is not None:
        return set(_no_rope(raw, known))
    return set(range(raw.max_window_layers, raw.num_hidden_layers))
