"""The decoder: turns a batch into logits. DecoderConfig sets what differs between families; a switch that is off costs nothing.

Per layer: x + o(attention(rope(norm(q)), rope(norm(k)), v)), then x + down(act(gate) * up); with output norms, both sums add
the normed output. The module reads no tensor: it names its parts to a builder. The names below are canonical, those of a Llama
checkpoint and of two norms that a Llama does not have; a family maps them to the names in its checkpoints. Knows no
sequences and no plugins; the caller runs it under `torch.inference_mode`. In bfloat16 and float16, the residual stream x and the
logits are float32; weights, the inputs of linears and KV have the model's dtype. Shapes: T tokens flat, R logit rows, H query
heads and Hkv KV heads of size D; q, k and v are views of one tensor, so their rows are strided.
"""

from __future__ import annotations

from copy import copy
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.kv.store import DenseKV, KVStore
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.layers import Ops, wide
from pitlane.engine.models.parts import Feed, Part
from pitlane.engine.models.recorder import PartMaker, Recorder
from pitlane.engine.models.rope import Rope
from pitlane.engine.run.batch import Attention, Batch, SinkAttention

EMBEDDING, LAYER, NORM, HEAD = "model.embed_tokens", "model.layers.{}.", "model.norm", "lm_head"
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM = "attention_output_norm", "mlp_output_norm"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{part}_proj" for part in "qkvo")
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
Angles: TypeAlias = tuple[Tensor, Tensor]
ACTIVATIONS = {"silu": "silu_mul", "gelu_tanh": "gelu_mul"}  # -> name in `Ops`
FUSED = ("add_rms_norm", "rope_store")  # names in `Ops`


class Layer:
    """The weights of one layer. Its KV is layer `index_in_group` of the store of KV group `group`.

    rope: index of its rotary embedding in `Decoder.ropes`; None = no RoPE.
    """

    def __init__(
        self, config: DecoderConfig, build: PartMaker, index: int, group: int, index_in_group: int, rope: int | None
    ) -> None:
        at, hidden, inner = LAYER.format(index), config.hidden_size, config.intermediate_size
        offset = config.norm_offset
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.group, self.index_in_group, self.rope = group, index_in_group, rope
        self.attention_norm = build.norm(at + ATTENTION_NORM, hidden, offset)
        qkv = {at + QUERY: queries, at + KEY: keys, at + VALUE: keys}
        self.qkv = build.linear(
            hidden, qkv, bias=config.attention_bias, split="out", fed_by=Feed(at + ATTENTION_NORM, is_norm=True)
        )
        self.qk_norm = _qk_norm(config, build, at) if config.qk_norm else None
        values = Feed(at + VALUE, config.num_kv_heads, config.num_heads // config.num_kv_heads)
        self.output = build.linear(queries, {at + OUTPUT: hidden}, bias=config.output_bias, split="in", fed_by=values)
        self.mlp_norm = build.norm(at + MLP_NORM, hidden, offset)
        gate_up, norm = {at + GATE: inner, at + UP: inner}, Feed(at + MLP_NORM, is_norm=True)
        self.gate_up = build.linear(hidden, gate_up, bias=config.mlp_bias, split="out", fed_by=norm)
        self.down = build.linear(inner, {at + DOWN: hidden}, bias=config.mlp_bias, split="in", fed_by=Feed(at + UP))
        self.attention_output_norm: Tensor | None = None
        self.mlp_output_norm: Tensor | None = None
        if config.output_norms:
            self.attention_output_norm = build.norm(at + ATTENTION_OUTPUT_NORM, hidden, offset)
            self.mlp_output_norm = build.norm(at + MLP_OUTPUT_NORM, hidden, offset)


class Decoder:
    """kv_groups: the layers by attention window; `forward` takes a store per group.

    op_kinds: the fields of `Ops` in use. fused_kinds: the fields of `Ops` that join operations; a plan may leave them out.
    """

    def __init__(self, config: DecoderConfig, build: PartMaker) -> None:
        self.config = config
        self.ops = Ops()
        self.op_kinds, self.fused_kinds = ("rms_norm", ACTIVATIONS[config.activation]), FUSED
        self.num_layers, self.exit_layers, self.kv_groups = config.num_layers, config.exit_layers, config.kv_groups
        self.residual_dtype = residual_dtype(build.dtype)
        # transformers rounds the factor to the model's dtype too
        self.multiplier = float(torch.tensor(config.embedding_multiplier, dtype=build.dtype))
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        distinct = [rope for index, rope in enumerate(ropes) if rope is not None and rope not in ropes[:index]]
        self.ropes = [Rope(rope, config.head_dim, build.dtype, build.device) for rope in distinct]
        self.embedding = build.embedding(EMBEDDING, config.vocab_size, config.hidden_size, config.tie_word_embeddings)
        # before the layers: while the largest part is packed, it lies in memory twice
        tied_to = EMBEDDING if config.tie_word_embeddings else None
        self.head = build.linear(config.hidden_size, {HEAD: config.vocab_size}, split="out", tied_to=tied_to)
        places = {layer: (g, i) for g, group in enumerate(self.kv_groups) for i, layer in enumerate(group.layers)}
        self.layers = [
            Layer(config, build, index, *places[index], None if rope is None else distinct.index(rope))
            for index, rope in enumerate(ropes)
        ]
        self.norm = build.norm(NORM, config.hidden_size, config.norm_offset)

    def forward(
        self,
        batch: Batch,
        stores: list[KVStore],
        attention: Attention,
        reads: list[Any],
        num_layers: int | None = None,
    ) -> Tensor:
        """Write the batch's KV and return logits [R, V] of its logit rows, in `residual_dtype`.

        reads: per KV group, the result of `attention.prepare`. num_layers: run only the first `num_layers` layers, then norm and
        head (early exit, for drafts).
        """
        x = self.embedded(batch.token_ids)
        angles = [rope.angles(batch.positions) for rope in self.ropes]
        shifted = [
            None if group.sink_positions is None else self._shifted(group.sink_positions) for group in batch.groups
        ]
        out: Tensor | None = None  # of the last layer, not yet added to x: a fused operation adds and norms in one pass
        for layer in self.layers[:num_layers]:
            x, out = self.run_layer(
                layer, x, out, angles, shifted[layer.group], batch, stores[layer.group], attention, reads[layer.group]
            )
        assert out is not None, "a model runs at least one layer"
        x, out = (rows.index_select(0, batch.logit_rows) for rows in (x, out))
        normed = self.ops.add_norm(x, out, self.norm, self.config.rms_norm_eps)[1]
        return wide(self.head, normed).to(self.residual_dtype)

    def embedded(self, token_ids: Tensor) -> Tensor:
        """Return the rows [T, hidden] that the first layer reads, a new tensor in `residual_dtype`."""
        x: Tensor = self.embedding(token_ids).to(self.residual_dtype)
        if self.multiplier != 1.0:
            x *= self.multiplier
        return x

    def run_layer(
        self,
        layer: Layer,
        x: Tensor,
        out: Tensor | None,
        angles: list[Angles],
        shifted: list[Angles] | None,
        batch: Batch,
        store: KVStore,
        attention: Attention,
        reads: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run a layer over x + out [T, hidden]; None: over x. Returns x and out of the next layer. May write into x."""
        norm, add_norm, eps = self.ops.rms_norm, self.ops.add_norm, self.config.rms_norm_eps
        activate = getattr(self.ops, self.op_kinds[1])
        weight = layer.attention_norm
        x, normed = (x, norm(x, weight, eps)) if out is None else add_norm(x, out, weight, eps)
        out = self._attend(layer, normed, angles, shifted, batch, store, attention, reads)
        if layer.attention_output_norm is not None:
            out = norm(out, layer.attention_output_norm, eps)
        x, normed = add_norm(x, out, layer.mlp_norm, eps)
        out = wide(layer.down, activate(layer.gate_up(normed)))
        return x, out if layer.mlp_output_norm is None else norm(out, layer.mlp_output_norm, eps)

    def _shifted(self, sink_positions: Tensor) -> list[Angles]:
        """The angles of the queries for sinks, per rotary embedding."""
        return [rope.angles(sink_positions) for rope in self.ropes]

    def with_ops(self, ops: Ops) -> Decoder:
        """Return a model with the same weights and other operations."""
        model = copy(self)
        model.ops = ops
        return model

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        angles: list[Angles],
        shifted: list[Angles] | None,
        batch: Batch,
        store: KVStore,
        attention: Attention,
        reads: Any,
    ) -> Tensor:
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (dim,), None, self.config.rms_norm_eps) * layer.qk_norm
        sink_q = qk[:, :heads]
        slots, rope_store = batch.groups[layer.group].slots, self.ops.rope_store
        if layer.rope is not None and shifted is not None:
            sink_q = self.ropes[layer.rope].rotate(sink_q, *shifted[layer.rope])
        if layer.rope is not None and rope_store is not None and type(store) is DenseKV:
            qk = rope_store(qk, v, *angles[layer.rope], *store.tensors(layer.index_in_group), slots)
        else:
            if layer.rope is not None:
                qk = self.ropes[layer.rope].rotate(qk, *angles[layer.rope])
            store.write(layer.index_in_group, slots, qk[:, heads:], v)
        q, k = qk[:, :heads], qk[:, heads:]
        if shifted is None:
            out = attention(q, k, v, store, layer.index_in_group, reads)
        else:  # a plan whose attention cannot read sinks was refused
            out = cast(SinkAttention, attention)(q, k, v, store, layer.index_in_group, reads, sink_q)
        return wide(layer.output, out.reshape(x.shape[0], heads * dim))


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream and of the logits in a model of `dtype`: float32 for bfloat16 and float16, else `dtype`.

    This divides the KL divergence of SmolLM2 in bfloat16 from float32 by four (docs/exactness.md).
    """
    return torch.promote_types(dtype, torch.float32)


def _qk_norm(config: DecoderConfig, build: PartMaker, at: str) -> Tensor:
    """Return the norm weights of all heads, [H + Hkv, D], so that one pass norms queries and keys."""
    query = build.norm(at + QUERY_NORM, config.head_dim, config.norm_offset).expand(config.num_heads, -1)
    key = build.norm(at + KEY_NORM, config.head_dim, config.norm_offset).expand(config.num_kv_heads, -1)
    return torch.cat((query, key))


def parts_of(config: DecoderConfig) -> list[Part]:
    """Return the parts of a model in the order in which they are built. Reads no tensor."""
    recorder = Recorder()
    Decoder(config, recorder)
    return recorder.parts
