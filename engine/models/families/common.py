"""Reads the keys of a `config.json` that all families share: sizes, heads, dtype, end-of-text ids. Refuses unsupported features."""

from __future__ import annotations

from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import ConfigFile, short
from pitlane.engine.models.quantized.config import reader_of

MAX_WIDTH = 2**20  # a hundred times the widest model known
DTYPES = ("float64", "float32", "bfloat16", "float16")


def decoder_config(
    raw: ConfigFile, model_type: str, *, head_dim: int | None, tied: bool, **switches: Any
) -> DecoderConfig:
    """Make a DecoderConfig of the common values and the switches of a family.

    head_dim, tied: the family's defaults. head_dim None: hidden_size / num_attention_heads.
    """
    _refuse(raw, model_type)
    heads, kv_heads = raw.num_attention_heads, raw.num_key_value_heads or raw.num_attention_heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    if heads * (raw.head_dim or 1) > MAX_WIDTH:
        raise ModelError(f"num_attention_heads * head_dim must be at most {MAX_WIDTH:,}, got {heads} * {raw.head_dim}")
    common: dict[str, Any] = {
        "hidden_size": raw.hidden_size,
        "intermediate_size": raw.intermediate_size,
        "num_layers": raw.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": _head_dim(raw, head_dim),
        "vocab_size": raw.vocab_size,
        "max_position": raw.max_position_embeddings,
        "rms_norm_eps": raw.rms_norm_eps,
        "tie_word_embeddings": tied if raw.tie_word_embeddings is None else raw.tie_word_embeddings,
        "attention_bias": bool(raw.attention_bias),
        "output_bias": bool(raw.attention_bias),
        "exit_layers": tuple(layer for layer in raw.exit_layers or () if 0 < layer < raw.num_hidden_layers),
        "eos_token_ids": tuple(raw.eos_token_id or ()),
        "dtype": _dtype(raw),
    }
    return DecoderConfig(model_type, **(common | switches))


def check_activation(name: str | None, known: tuple[str, ...], model_type: str) -> None:
    if name is not None and name not in known:
        raise UnsupportedModel(
            f"{model_type} with activation {short(name)} is not supported; known: {', '.join(known)}"
        )


def check_length(name: str, values: list[Any], num_layers: int) -> None:
    if len(values) != num_layers:
        raise ModelError(f"{name} must have an entry for each of {num_layers} layers, got {len(values)}")


def _refuse(raw: ConfigFile, model_type: str) -> None:
    reader_of({"quantization_config": raw.quantization_config, "compression_config": raw.compression_config})
    if raw.partial_rotary_factor not in (None, 1.0):
        raise UnsupportedModel(f"{model_type} with partial_rotary_factor {raw.partial_rotary_factor} is not supported")


def _head_dim(raw: ConfigFile, default: int | None) -> int:
    size = raw.head_dim or default
    if size is None:
        size, rest = divmod(raw.hidden_size, raw.num_attention_heads)
        if rest:
            raise ModelError(
                f"hidden_size must be a multiple of num_attention_heads if head_dim is not given, "
                f"got {raw.hidden_size} and {raw.num_attention_heads}"
            )
    if size % 2:
        raise UnsupportedModel(f"head_dim must be even, because RoPE rotates pairs, got {size}")
    return size


def _dtype(raw: ConfigFile) -> str:
    dtype = (raw.dtype or raw.torch_dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"weights of dtype {short(dtype)} are not supported; known: {', '.join(DTYPES)}")
    return dtype
