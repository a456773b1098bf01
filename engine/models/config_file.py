"""The JSON files of a model folder as typed fields. An error names the key, shows the value, and says what to do.

Checks the type and range of values; `families/` know their meaning. A number must be a JSON number of the right type (no
text, no 16.0 for 16), finite, and in a range that a model could have. Keys that the family does not read are ignored.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pitlane.engine.errors import ModelError

MAX_LAYERS = 4096
MAX_BYTES = 2**24  # of a JSON file; the largest known index has 9 MB
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


def _listed(value: object) -> object:
    return value if value is None or isinstance(value, list) else [value]


Size = Annotated[int, Field(ge=1, le=2**24)]
NumTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId] | None, Field(max_length=1024), BeforeValidator(_listed)]
Theta = Annotated[float, Field(gt=1, le=1e15)]
Factor = Annotated[float, Field(ge=1e-3, le=1e6)]


class JsonFile(BaseModel):
    """An object in a JSON file."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file. Raises a ModelError that names the file."""
        raw = read_json(file)
        try:
            return cls.of(raw)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None

    @classmethod
    def of(cls, raw: Mapping[str, Any], name: str = "") -> Self:
        """Check an object. name: its key in the file, for messages."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
        key = escaped(".".join(map(str, (*filter(None, [name]), *first["loc"]))))
        if first["type"] == "missing":
            raise ModelError(f"the file lacks {key}; download the model again or add it")
        rule = re.sub("^(Input|List|Dictionary) should", "must", first["msg"])
        raise ModelError(f"{key} {rule}, got {short(first['input'])}; correct it")


class FamilyFile(JsonFile):
    """The keys of `config.json` that name the model family."""

    architectures: list[str] | None = Field(None, max_length=16)
    model_type: str | None = None


class ConfigFile(JsonFile):
    """The keys of `config.json` that several families read, in the spelling of transformers 4 or 5."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Size
    max_position_embeddings: NumTokens
    rms_norm_eps: float = Field(1e-6, ge=0, lt=1)
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: NumTokens | None = None
    use_sliding_window: bool | None = None
    sliding_window: NumTokens | None = None
    max_window_layers: int = Field(28, ge=0)
    layer_types: list[str] | None = Field(None, max_length=MAX_LAYERS)
    no_rope_layers: list[Literal[0, 1]] | None = Field(None, max_length=MAX_LAYERS)
    no_rope_layer_interval: Size | None = None
    exit_layers: list[int] | None = Field(None, max_length=MAX_LAYERS)
    eos_token_id: TokenIds = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: Any = None
    compression_config: Any = None


class RopeFile(JsonFile):
    """`rope_parameters`, in older files `rope_scaling`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: float | None = None
    factor: Factor | None = None
    original_max_position_embeddings: float | None = Field(None, ge=1, le=2**31 - 1)
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: float | None = Field(None, ge=0, le=1e6)
    mscale_all_dim: float | None = Field(None, ge=0, le=1e6)
    truncate: bool = True


class GenerationFile(JsonFile):
    """`generation_config.json`."""

    eos_token_id: TokenIds = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)

    @property
    def sampling(self) -> dict[str, float]:
        """The values that concern sampling, by the names of SamplingParams. As in transformers, `do_sample` false is greedy."""
        if self.do_sample is False:
            return {"temperature": 0.0}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"temperature": 1.0, **values} if self.do_sample else values


class IndexFile(JsonFile):
    """`model.safetensors.index.json`: names the shard of each tensor."""

    weight_map: dict[str, str] = Field(min_length=1, max_length=2**18)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a file. Raises a ModelError that names the file."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ModelError(
                f"{file} has {file.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read; download the model again"
            )
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is damaged and cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds {short(value)}, not an object; download the model again")
    return value


def escaped(text: str) -> str:
    """A name from a file as a short line for a message: escaped, without quotes."""
    return short(text)[1:-1]


def short(value: object) -> str:
    """Any value as a short, escaped line for a message."""
    return SHORT.repr(value)
