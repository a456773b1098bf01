"""What a model declares of itself, read from `config.json` in the spelling of transformers 4 or 5.

Knows no weights and no torch. What architectures differ in and their files do not say stands in `ARCHITECTURES`; all
else is a field, so that one decoder serves them all. Anything the decoder does not build is refused by name here,
before weights are touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel

ROPE_KINDS: Mapping[str, tuple[str, ...]] = {  # kind -> the parameters it must have
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
REFUSED_ROPE: Mapping[str, str] = {
    "dynamic": "its angles change with the length of the prompt, so stored keys would go stale",
    "longrope": "its angles change with the length of the prompt, so stored keys would go stale",
}
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What transformers takes for granted where `config.json` is silent."""

    model_type: str
    rope_theta: float = 10000.0
    tied: bool = False
    attention_bias: bool | None = None  # q, k, v bias; None: `attention_bias` says, of the output projection too
    qk_norm: bool = False
    head_dim: int | None = None
    window: int | None = None  # where `sliding_window` is absent
    switched_window: bool = False  # a window counts only with `use_sliding_window`, on the layers of `layer_types`
    no_rope_interval: int | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("mistral", attention_bias=False, window=4096),
    "Qwen2ForCausalLM": Architecture("qwen2", attention_bias=True, switched_window=True),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True, head_dim=128, switched_window=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", 2000000.0, True, switched_window=True, no_rope_interval=4),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. parameters: those of the kind (factor, beta_fast, ...), by their names in `config.json`."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and switches of one decoder. windows: per layer, tokens a query sees, its own included (None = all).

    attention_bias: of q, k and v. dtype: of the checkpoint, one of `DTYPES`. no_rope_layers: layers without RoPE.
    exit_layers: numbers of first layers after which norm and head were trained too.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    no_rope_layers: frozenset[int] = frozenset()
    windows: tuple[int | None, ...] = ()
    exit_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5)

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `config.json`, and `generation_config.json` for the tokens that end an answer."""
        folder = Path(path)
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"no config.json in {folder}; give the folder of a model in Hugging Face format")
        raw = _read_json(file)
        try:
            config = _from_json(raw, file)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(f"{file} holds a value that cannot be: {error}; correct it") from None
        generation = folder / "generation_config.json"
        ends = _read_json(generation).get("eos_token_id") if generation.is_file() else None
        return replace(config, eos_token_ids=_ids(raw.get("eos_token_id") if ends is None else ends))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds {type(value).__name__}, not an object; download the model again")
    return value


def _from_json(raw: dict[str, Any], file: Path) -> ModelConfig:
    name, known = _architecture(raw, file)
    _refuse(raw, name)
    hidden, heads = _need(raw, "hidden_size", file), _need(raw, "num_attention_heads", file)
    layers = _need(raw, "num_hidden_layers", file)
    bias = bool(raw.get("attention_bias", False))
    head_dim = raw.get("head_dim") or known.head_dim or hidden // heads
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(f"{file}: num_attention_heads must divide by num_key_value_heads, got {heads} and {kv_heads}")
    return ModelConfig(
        architecture=name,
        hidden_size=hidden,
        intermediate_size=_need(raw, "intermediate_size", file),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_need(raw, "vocab_size", file),
        max_position=_need(raw, "max_position_embeddings", file),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", known.tied)),
        attention_bias=bias if known.attention_bias is None else known.attention_bias,
        output_bias=bias and known.attention_bias is None,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=known.qk_norm,
        rope=_rope(raw, known, file),
        no_rope_layers=_no_rope(raw, known, layers),
        windows=_windows(raw, known, layers),
        exit_layers=tuple(layer for layer in raw.get("exit_layers", ()) if 0 < layer < layers),
        dtype=_dtype(raw),
    )


def _architecture(raw: dict[str, Any], file: Path) -> tuple[str, Architecture]:
    named = raw.get("architectures") or [n for n, a in ARCHITECTURES.items() if a.model_type == raw.get("model_type")]
    if not named:
        raise ModelError(f"{file} names no architecture; known: {', '.join(ARCHITECTURES)}")
    if named[0] not in ARCHITECTURES:
        raise UnsupportedModel(f"architecture {named[0]} is not built here; known: {', '.join(ARCHITECTURES)}")
    return named[0], ARCHITECTURES[named[0]]


def _refuse(raw: dict[str, Any], name: str) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(f"the checkpoint is quantized ({method}), which is not read here; use the plain one")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(f"{name} with hidden_act {raw['hidden_act']!r} is not built here; known: silu")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"{name} with partial_rotary_factor {raw['partial_rotary_factor']} is not built here")


def _need(raw: dict[str, Any], key: str, file: Path) -> int:
    if key not in raw:
        raise ModelError(f"{file} lacks {key}; download the model again or add it")
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{file}: {key} must be a whole number of at least 1, got {value!r}")
    return value


def _rope(raw: dict[str, Any], known: Architecture, file: Path) -> RopeConfig:
    given: dict[str, Any] = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel(f"{file}: RoPE that differs by layer type ({', '.join(given)}) is not built here")
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or known.rope_theta)
    if kind not in ROPE_KINDS:
        reason = REFUSED_ROPE.get(kind, "it is not known")
        raise UnsupportedModel(f"RoPE kind {kind!r} is not built here: {reason}; known: {', '.join(ROPE_KINDS)}")
    missing = [key for key in ROPE_KINDS[kind] if given.get(key) is None]
    if missing:
        raise ModelError(f"{file}: RoPE kind {kind!r} lacks {', '.join(missing)}")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("RoPE on a part of the head (partial_rotary_factor) is not built here")
    parameters = {} if kind == "default" else {key: float(v) for key, v in given.items() if isinstance(v, int | float)}
    if kind in ("yarn", "llama3"):
        original = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        parameters.setdefault("original_max_position_embeddings", float(original))
    if not all(math.isfinite(value) for value in (theta, *parameters.values())) or theta <= 0:
        raise ModelError(f"{file}: RoPE parameters must be finite and theta above 0, got {theta} and {parameters}")
    return RopeConfig(theta, kind, parameters)


def _no_rope(raw: dict[str, Any], known: Architecture, layers: int) -> frozenset[int]:
    """`no_rope_layers` of the file holds 1 where RoPE is used, against its name."""
    if known.no_rope_interval is None:
        return frozenset()
    interval = raw.get("no_rope_layer_interval") or known.no_rope_interval
    uses = raw.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    return frozenset(layer for layer in range(layers) if not uses[layer])


def _windows(raw: dict[str, Any], known: Architecture, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", known.window)
    if not known.switched_window:
        return (window if known.window else None,) * layers
    if not raw.get("use_sliding_window", False) or window is None:
        return (None,) * layers
    types = raw.get("layer_types")
    if types is not None:
        local = {layer for layer in range(layers) if types[layer] == "sliding_attention"}
    elif known.no_rope_interval is not None:
        local = set(_no_rope(raw, known, layers))
    else:
        local = set(range(raw.get("max_window_layers", 28), layers))
    return tuple(window if layer in local else None for layer in range(layers))


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"weights of dtype {dtype!r} are not read here; known: {', '.join(DTYPES)}")
    return dtype


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
