"""Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and SmolLM3: one decoder; ModelConfig sets the differences.

Per layer: x + o(attention(rope(norm(q)), rope(norm(k)), v)), then x + down(silu(gate) * up). Knows no sequences and no
plugins; the caller runs it under `torch.inference_mode`. Shapes: T tokens flat, R logit rows, H query heads and Hkv KV
heads of size D; q, k and v are views of one tensor, so their rows are strided.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import KVStore
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.layers import Ops
from pitlane.engine.models.parts import Part
from pitlane.engine.models.recorder import PartMaker, Recorder
from pitlane.engine.models.rope import Rope
from pitlane.engine.run.batch import Attention, Batch

EMBEDDING, LAYER, NORM, HEAD = "model.embed_tokens", "model.layers.{}.", "model.norm", "lm_head"
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{part}_proj" for part in "qkvo")
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))


class Layer:
    """The weights of one layer. Its KV is layer `index_in_group` of the store of KV group `group`."""

    def __init__(self, config: ModelConfig, build: PartMaker, index: int, group: int, index_in_group: int) -> None:
        at, hidden, inner = LAYER.format(index), config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.group, self.index_in_group = group, index_in_group
        self.uses_rope = index not in config.no_rope_layers
        self.attention_norm = build.norm(at + ATTENTION_NORM, hidden)
        outputs = {at + QUERY: queries, at + KEY: keys, at + VALUE: keys}
        self.qkv = build.linear(hidden, outputs, bias=config.attention_bias, split="out")
        self.qk_norm = _qk_norm(config, build, at) if config.qk_norm else None
        self.output = build.linear(queries, {at + OUTPUT: hidden}, bias=config.output_bias, split="in")
        self.mlp_norm = build.norm(at + MLP_NORM, hidden)
        self.gate_up = build.linear(hidden, {at + GATE: inner, at + UP: inner}, bias=config.mlp_bias, split="out")
        self.down = build.linear(inner, {at + DOWN: hidden}, bias=config.mlp_bias, split="in")


class Llama:
    """The decoder: turns a batch into logits. kv_groups: the layers by attention window. `forward` takes a store per group."""

    def __init__(self, config: ModelConfig, build: PartMaker) -> None:
        self.config = config
        self.ops = Ops()
        self.num_layers, self.exit_layers = config.num_layers, config.exit_layers
        windows = list(dict.fromkeys(config.windows))
        group_layers = [tuple(i for i, layer in enumerate(config.windows) if layer == window) for window in windows]
        self.kv_groups = tuple(
            KVGroup(layers, config.num_kv_heads, config.head_dim, window)
            for layers, window in zip(group_layers, windows, strict=True)
        )
        self.rope = Rope(config.rope, config.head_dim, build.dtype, build.device)
        tied = config.tie_word_embeddings
        self.embedding = build.embedding(EMBEDDING, config.vocab_size, config.hidden_size, tied)
        self.layers: list[Layer] = []
        for index, window in enumerate(config.windows):
            group = windows.index(window)
            self.layers.append(Layer(config, build, index, group, group_layers[group].index(index)))
        self.norm = build.norm(NORM, config.hidden_size)
        outputs, table = {HEAD: config.vocab_size}, EMBEDDING if tied else None
        self.head = build.linear(config.hidden_size, outputs, split="out", tied_to=table)

    def forward(
        self, batch: Batch, stores: list[KVStore], attention: Attention, num_layers: int | None = None
    ) -> Tensor:
        """Write the batch's KV and return logits [R, V] of its logit rows, in the model's dtype.

        num_layers: run only the first `num_layers` layers, then norm and head (early exit, for drafts).
        """
        x = self.embedding(batch.token_ids)
        angles = self.rope.angles(batch.positions)
        norm, silu_mul, eps = self.ops.rms_norm, self.ops.silu_mul, self.config.rms_norm_eps
        for layer in self.layers[:num_layers]:
            normed = norm(x, layer.attention_norm, eps)
            x += self._attend(layer, normed, angles, batch, stores[layer.group], attention)
            x += layer.down(silu_mul(layer.gate_up(norm(x, layer.mlp_norm, eps))))
        logits: Tensor = self.head(norm(x.index_select(0, batch.logit_rows), self.norm, eps))
        return logits

    def with_ops(self, ops: Ops) -> Llama:
        """Return a model with the same weights and other operations."""
        model = copy(self)
        model.ops = ops
        return model

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: Batch,
        store: KVStore,
        attention: Attention,
    ) -> Tensor:
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (dim,), None, self.config.rms_norm_eps) * layer.qk_norm
        if layer.uses_rope:
            qk = self.rope.rotate(qk, *angles)
        q, k = qk[:, :heads], qk[:, heads:]
        store.write(layer.index_in_group, batch.slots[layer.group], k, v)
        out = attention(q, k, v, store, layer.index_in_group, batch, layer.group)
        return layer.output(out.reshape(x.shape[0], heads * dim))


def parts_of(config: ModelConfig) -> list[Part]:
    """The parts of a model, in the order in which they are built."""
    recorder = Recorder()
    Llama(config, recorder)
    return recorder.parts


def _qk_norm(config: ModelConfig, build: PartMaker, at: str) -> Tensor:
    """Repeat the norm weights per head, [H + Hkv, D]: one pass then norms queries and keys."""
    query = build.norm(at + QUERY_NORM, config.head_dim).expand(config.num_heads, -1)
    return torch.cat((query, build.norm(at + KEY_NORM, config.head_dim).expand(config.num_kv_heads, -1)))
