"""The shape and the switches of a decoder, as plain data. A family (`families/`) makes a DecoderConfig from a `config.json`.

Knows no file, no weights and no torch. `decoder.py` reads the switches once, when it builds itself. A switch has a default that
adds nothing to a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pitlane.engine.kv.state import KVGroup
from pitlane.engine.models.rope_config import RopeConfig as RopeConfig

Activation: TypeAlias = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape and switches of one decoder.

    model_type: the family's name in transformers. dtype: dtype of the checkpoint. exit_layers: the model is trained for
    an early exit after these numbers of layers: norm and head may follow there.

    Attention. attention_bias: bias of q, k and v. output_bias: bias of the output projection. qk_norm: RMS norm of each query
    and key head. query_pre_attn_scalar: scores are divided by its square root (None: head_dim). windows: per layer, number of
    tokens that a query attends to, its own token included (None: all). rope: rotary embedding of a layer. local_rope: rotary
    embedding of a layer with a window (None: rope). no_rope_layers: layers without RoPE.

    Norms. norm_offset: number added to the weight of every RMS norm. output_norms: the outputs of attention and MLP are normed
    before they are added to the residual stream. embedding_multiplier: factor on the embedded tokens.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0
    output_norms: bool = False
    activation: Activation = "silu"
    embedding_multiplier: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_pre_attn_scalar: float | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
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
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The layers by window, in the order of their first layers."""
        layers: dict[int | None, list[int]] = {}
        for layer, window in enumerate(self.windows):
            layers.setdefault(window, []).append(layer)
        return tuple(
            KVGroup(tuple(members), self.num_kv_heads, self.head_dim, window) for window, members in layers.items()
        )

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer; None for a layer without RoPE."""
        if layer in self.no_rope_layers:
            return None
        return self.rope if self.local_rope is None or self.windows[layer] is None else self.local_rope
