"""Reads the rotary embedding (RoPE) and the context length from a `config.json`. `rope.py` computes the angles.

Reads the keys of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). A file with both is read as
transformers 5 reads it. Unsupported kinds are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import ConfigFile, RopeFile, short

ROPE_KINDS: Mapping[str, tuple[str, ...]] = {  # kind -> its required parameters
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
REFUSED_ROPE: Mapping[str, str] = {
    "dynamic": "its angles change with the length of the prompt, so stored keys would go stale",
    "longrope": "its angles change with the length of the prompt, so stored keys would go stale",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """A rotary embedding. parameters: of its kind (factor, beta_fast, ...), by their names in `config.json`."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)


def read_rope(raw: ConfigFile, default_theta: float) -> RopeConfig:
    """Read the rotary embedding of all layers. `rope_scaling` overrides `rope_parameters`, as in transformers 5."""
    name = "rope_scaling" if raw.rope_scaling else "rope_parameters"
    given = getattr(raw, name) or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel(f"RoPE that differs by layer type ({short(list(given))}) is not supported")
    return rope_of(raw, given, name, raw.rope_theta or default_theta)


def rope_of(raw: ConfigFile, given: Mapping[str, Any], name: str, theta: float) -> RopeConfig:
    """Read the kind and its parameters from an object. name: its key in the file. theta: for an object without `rope_theta`."""
    rope = RopeFile.of(given, name)
    kind = rope.rope_type or rope.type
    if kind is None and given.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise ModelError(f"{name} names no rope_type beside {short(sorted(given))}; add it")
    kind = kind or "default"
    if kind not in ROPE_KINDS:
        reason = REFUSED_ROPE.get(kind, "the kind is not known")
        raise UnsupportedModel(f"RoPE kind {short(kind)} is not supported: {reason}; known: {', '.join(ROPE_KINDS)}")
    if rope.partial_rotary_factor not in (None, 1.0):
        raise UnsupportedModel("RoPE on a part of the head (partial_rotary_factor) is not supported")
    return RopeConfig(rope.rope_theta or theta, kind, _parameters(raw, rope, kind))


def longest(raw: ConfigFile, rope: RopeConfig) -> int:
    """Return the context with scaled RoPE. In YaRN and linear RoPE, `max_position_embeddings` is often the unscaled context."""
    trained_lengths = {
        "yarn": rope.parameters.get("original_max_position_embeddings", 0),
        "linear": raw.max_position_embeddings,
    }
    return max(raw.max_position_embeddings, int(trained_lengths.get(rope.kind, 0) * rope.parameters.get("factor", 1)))


def _parameters(raw: ConfigFile, rope: RopeFile, kind: str) -> dict[str, float]:
    """The parameters of the kind. A trained length beside `rope_scaling` overrides a length inside it, as in transformers 5."""
    trained_length = raw.original_max_position_embeddings or rope.original_max_position_embeddings
    rope = rope.model_copy(update={"original_max_position_embeddings": trained_length or raw.max_position_embeddings})
    missing = [key for key in ROPE_KINDS[kind] if getattr(rope, key) is None]
    if missing:
        raise ModelError(f"RoPE kind {kind!r} lacks {', '.join(missing)}")
    keys = ROPE_KINDS[kind] + (YARN_OPTIONS if kind == "yarn" else ())
    parameters = {key: float(value) for key in keys if (value := getattr(rope, key)) is not None}
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ModelError(f"high_freq_factor must be above low_freq_factor, got {parameters}")
    return parameters
