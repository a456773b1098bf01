"""The logits of a decoder with attention sinks, computed plainly: a query rotates its visible keys by their places in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pitlane import KVState
from pitlane.engine.decode.draft import Draft
from pitlane.engine.models.layers import gelu_mul, rms_norm, silu_mul
from pitlane.engine.run.batch import Chunk


def visible_tokens(position: int, num_sinks: int, window: int, stride: int) -> list[int]:
    """Drop strides of old tokens until the position sees at most `window` tokens behind the sinks."""
    start = 0
    while position - start >= window:
        start += stride
    return [token for token in range(position + 1) if token < num_sinks or token >= start]


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int], num_sinks: int, window: int, stride: int) -> Tensor:
    """Logits [T, V] after every token. The layers with a window of their own see their window, at true distances."""
    config, eps = model.config, model.config.rms_norm_eps
    activate = {"silu": silu_mul, "gelu_tanh": gelu_mul}[config.activation]
    x = model.embedding(torch.tensor(token_ids)) * model.multiplier
    for index, layer in enumerate(model.layers):
        out = layer.output(_attended(model, layer, config.windows[index], x, num_sinks, window, stride))
        x = x + (out if layer.attention_output_norm is None else rms_norm(out, layer.attention_output_norm, eps))
        out = layer.down(activate(layer.gate_up(rms_norm(x, layer.mlp_norm, eps))))
        x = x + (out if layer.mlp_output_norm is None else rms_norm(out, layer.mlp_output_norm, eps))
    logits: Tensor = model.head(rms_norm(x, model.norm, eps))
    return logits


def _attended(
    model: Any, layer: Any, own_window: int | None, x: Tensor, num_sinks: int, window: int, stride: int
) -> Tensor:
    config, count = model.config, len(x)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = layer.qkv(rms_norm(x, layer.attention_norm, config.rms_norm_eps)).view(count, heads + 2 * kv_heads, dim)
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if layer.qk_norm is not None:
        qk = torch.nn.functional.rms_norm(qk, (dim,), None, config.rms_norm_eps) * layer.qk_norm
    outputs = []
    for position in range(count):
        seen = visible_tokens(position, num_sinks, window, stride)
        if own_window is not None:
            seen = list(range(max(0, position + 1 - own_window), position + 1))
        visible = qk[seen]
        if layer.rope is not None:
            rope = model.ropes[layer.rope]
            visible = rope.rotate(visible, *rope.angles(torch.arange(len(seen))))
        q, k = visible[-1, :heads], visible[:, heads:].repeat_interleave(heads // kv_heads, 1)
        weights = (config.attention_scale * torch.einsum("hd,shd->hs", q, k)).softmax(-1)
        outputs.append(torch.einsum("hs,shd->hd", weights, v[seen].repeat_interleave(heads // kv_heads, 1)))
    return torch.stack(outputs).reshape(count, heads * dim)


def engine_logits(lane: Any, token_ids: list[int], step: int) -> Tensor:
    """Logits [T, V] of an engine after every token, in steps of a known token and a draft. Drops blocks as the loop does."""
    kv, rows = KVState(), []
    try:
        for start in range(0, len(token_ids), step):
            first, *draft = token_ids[start : start + step]
            assert lane.pool.reserve(kv, start + 1 + len(draft))
            chunk = Chunk(kv, [first], Draft(draft) if draft else None, True)
            rows.append(lane.runner.run(lane.builder.build([chunk])).logits)
            kv.num_computed_tokens += 1 + len(draft)
            lane.pool.drop(kv, kv.num_computed_tokens)
    finally:
        lane.pool.release(kv)
    return torch.cat(rows)
