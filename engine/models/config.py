"""A model's configuration, read from `config.json` in the spelling of transformers 4 or 5.

Knows no weights and no torch. `ARCHITECTURES` holds the defaults that a family's `config.json` does not write down; all
other differences are fields of ModelConfig, so that one decoder serves all families. A feature that the decoder lacks is
refused by name here, before any weights are read. `config_file.py` checks the type and the range of each value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import ConfigFile, GenerationFile, short
from pitlane.engine.models.rope_config import RopeConfig as RopeConfig
from pitlane.engine.models.rope_config import longest, read_rope

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The defaults of transformers for keys that a `config.json` leaves out."""

    model_type: str
    rope_theta: float = 10000.0
    tied: bool = False
    attention_bias: bool | None = None  # of q, k, v; None: the key `attention_bias` decides, also for the output
    has_mlp_bias: bool = False  # the key `mlp_bias` counts
    qk_norm: bool = False
    head_dim: int | None = None
    window: int | None = None  # if the key `sliding_window` is absent
    switched_window: bool = False  # the window needs `use_sliding_window`, and applies to the layers of `layer_types`
    no_rope_interval: int | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", has_mlp_bias=True),
    "MistralForCausalLM": Architecture("mistral", attention_bias=False, window=4096),
    "Qwen2ForCausalLM": Architecture("qwen2", attention_bias=True, window=4096, switched_window=True),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True, head_dim=128, window=4096, switched_window=True),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3", 2000000.0, True, has_mlp_bias=True, switched_window=True, no_rope_interval=4
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and switches of one decoder.

    windows: per layer, the number of tokens that a query sees, its own included (None: all). attention_bias: bias of q,
    k and v. output_bias: bias of the output projection. no_rope_layers: layers without RoPE. exit_layers: numbers of
    layers after which norm and head were trained to answer early. dtype: of the checkpoint, one of `DTYPES`.
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
        """Read `config.json`; take the tokens that end an answer from `generation_config.json`, if there is one."""
        folder = Path(path)
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"no config.json in {folder}; give the folder of a model in Hugging Face format")
        raw = ConfigFile.read(file)
        try:
            config = _declared(raw)
        except UnsupportedModel:
            raise
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None
        generation = folder / "generation_config.json"
        end_ids = GenerationFile.read(generation).eos_token_id if generation.is_file() else None
        return replace(config, eos_token_ids=tuple((raw.eos_token_id if end_ids is None else end_ids) or ()))


def _declared(raw: ConfigFile) -> ModelConfig:
    name, known = _architecture(raw)
    _refuse(raw, name)
    heads, kv_heads = raw.num_attention_heads, raw.num_key_value_heads or raw.num_attention_heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads must divide by num_key_value_heads, got {heads} and {kv_heads}")
    bias, rope = bool(raw.attention_bias), read_rope(raw, known.rope_theta)
    return ModelConfig(
        architecture=name,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(raw, known),
        vocab_size=raw.vocab_size,
        max_position=longest(raw, rope),
        rms_norm_eps=raw.rms_norm_eps,
        tie_word_embeddings=known.tied if raw.tie_word_embeddings is None else raw.tie_word_embeddings,
        attention_bias=bias if known.attention_bias is None else known.attention_bias,
        output_bias=bias and known.attention_bias is None,
        mlp_bias=bool(raw.mlp_bias) and known.has_mlp_bias,
        qk_norm=known.qk_norm,
        rope=rope,
        no_rope_layers=_no_rope(raw, known),
        windows=_windows(raw, known),
        exit_layers=tuple(layer for layer in raw.exit_layers or () if 0 < layer < raw.num_hidden_layers),
        dtype=_dtype(raw),
    )


def _architecture(raw: ConfigFile) -> tuple[str, Architecture]:
    names = raw.architectures or [n for n, a in ARCHITECTURES.items() if a.model_type == raw.model_type]
    if not names:
        raise ModelError(f"names no architecture; known: {', '.join(ARCHITECTURES)}")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel(f"architecture {short(names[0])} is not supported; known: {', '.join(ARCHITECTURES)}")
    return names[0], ARCHITECTURES[names[0]]


def _refuse(raw: ConfigFile, name: str) -> None:
    quantization = raw.quantization_config or raw.compression_config
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"the checkpoint is quantized ({short(method)}), which is not supported; use the unquantized model"
        )
    if raw.hidden_act not in (None, "silu", "swish"):
        raise UnsupportedModel(f"{name} with hidden_act {short(raw.hidden_act)} is not supported; known: silu")
    if raw.partial_rotary_factor not in (None, 1.0):
        raise UnsupportedModel(f"{name} with partial_rotary_factor {raw.partial_rotary_factor} is not supported")


def _head_dim(raw: ConfigFile, known: Architecture) -> int:
    size = raw.head_dim or known.head_dim
    if size is None:
        size, rest = divmod(raw.hidden_size, raw.num_attention_heads)
        if rest:
            raise ModelError(
                f"hidden_size must divide by num_attention_heads if head_dim is not given, "
                f"got {raw.hidden_size} and {raw.num_attention_heads}"
            )
    if size % 2:
        raise UnsupportedModel(f"head_dim must be even, because RoPE rotates pairs, got {size}")
    return size


def _no_rope(raw: ConfigFile, known: Architecture) -> frozenset[int]:
    """The layers without RoPE. Despite its name, the key `no_rope_layers` holds 1 for each layer with RoPE."""
    if known.no_rope_interval is None:
        return frozenset()
    layers, uses = range(raw.num_hidden_layers), raw.no_rope_layers
    interval = raw.no_rope_layer_interval or known.no_rope_interval
    if uses is None:
        return frozenset(layer for layer in layers if (layer + 1) % interval == 0)
    if len(uses) < len(layers):
        raise ModelError(f"no_rope_layers must have an entry for each of {len(layers)} layers, got {len(uses)}")
    return frozenset(layer for layer in layers if not uses[layer])


def _windows(raw: ConfigFile, known: Architecture) -> tuple[int | None, ...]:
    """The window of each layer. Raises UnsupportedModel if `layer_types` says otherwise."""
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
    if len(types) != len(windows):
        raise ModelError(f"layer_types must have an entry for each of {len(windows)} layers, got {len(types)}")
    for index, (kind, window) in enumerate(zip(types, windows, strict=True)):
        expected = "full_attention" if window is None else "sliding_attention"
        if kind != expected:
            raise UnsupportedModel(
                f"layer_types[{index}] {short(kind)} is not supported: by the other keys of config.json it is {expected}"
            )


def _local_layers(raw: ConfigFile, known: Architecture) -> set[int]:
    if raw.layer_types is not None:
        return {layer for layer, kind in enumerate(raw.layer_types) if kind == "sliding_attention"}
    if known.no_rope_interval is not None:
        return set(_no_rope(raw, known))
    return set(range(raw.max_window_layers, raw.num_hidden_layers))


def _dtype(raw: ConfigFile) -> str:
    dtype = (raw.dtype or raw.torch_dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"weights of dtype {short(dtype)} are not supported; known: {', '.join(DTYPES)}")
    return dtype
