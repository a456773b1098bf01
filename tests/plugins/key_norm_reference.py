"""The logits of a decoder with key-norm eviction, computed plainly: every layer keeps its keys and values in a list of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pitlane import KVState
from pitlane.engine.decode.draft import Draft
from pitlane.engine.kv.eviction import evict_blocks
from pitlane.engine.models.layers import rms_norm, silu_mul
from pitlane.engine.run.batch import Chunk

BLOCK = 32


@torch.inference_mode()
def reference_logits(
    model: Any, token_ids: list[int], budget: int, recent: int, interval: int
) -> tuple[Tensor, list[int]]:
    """Logits [T, V] after every token, and the blocks that are left at the end. For Llama models without windows."""
    layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]  # key and value of every token so far
    held: list[int] = []  # blocks before the present interval
    rows = []
    for start in range(0, len(token_ids), interval):
        stop = min(start + interval, len(token_ids))
        for token in range(start, stop):
            seen = [n for block in held for n in range(block * BLOCK, (block + 1) * BLOCK)] + [*range(start, token + 1)]
            rows.append(_logits(model, token_ids[token], token, layers, seen))
        if stop % interval:
            break
        held += range(start // BLOCK, stop // BLOCK)
        while len(held) * BLOCK > budget:
            optional = [block for block in held if block > 0 and (block + 1) * BLOCK <= stop - recent]
            held.remove(max(optional, key=lambda block: _mean_norm(layers, block)))
    return torch.stack(rows), held


def _logits(
    model: Any, token_id: int, position: int, layers: list[list[tuple[Tensor, Tensor]]], seen: list[int]
) -> Any:
    config, eps = model.config, model.config.rms_norm_eps
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    x = model.embedding(torch.tensor([token_id]))
    for layer, tokens in zip(model.layers, layers, strict=True):
        qkv = layer.qkv(rms_norm(x, layer.attention_norm, eps)).view(1, heads + 2 * kv_heads, dim)
        rope = model.ropes[layer.rope]
        qk = rope.rotate(qkv[:, : heads + kv_heads], *rope.angles(torch.tensor([position])))
        tokens.append((qk[0, heads:], qkv[0, heads + kv_heads :]))
        keys, values = (torch.stack([tokens[n][part] for n in seen]) for part in (0, 1))
        keys, values = (part.repeat_interleave(heads // kv_heads, 1) for part in (keys, values))
        weights = (config.attention_scale * torch.einsum("hd,shd->hs", qk[0, :heads], keys)).softmax(-1)
        x = x + layer.output(torch.einsum("hs,shd->hd", weights, values).reshape(1, heads * dim))
        x = x + layer.down(silu_mul(layer.gate_up(rms_norm(x, layer.mlp_norm, eps))))
    return model.head(rms_norm(x, model.norm, eps))[0]


def _mean_norm(layers: list[list[tuple[Tensor, Tensor]]], block: int) -> float:
    keys = [tokens[n][0] for tokens in layers for n in range(block * BLOCK, (block + 1) * BLOCK)]
    return float(torch.stack(keys).norm(dim=-1).mean())


def engine_logits(lane: Any, token_ids: list[int], step: int) -> tuple[Tensor, list[int]]:
    """The same of an engine, in steps of a known token and a draft. A step ends at an eviction, as the loop's steps do."""
    kv, rows, start = KVState(), [], 0
    try:
        while start < len(token_ids):
            count = int(min(step, lane.pool.num_before_eviction(start), len(token_ids) - start))
            first, *draft = token_ids[start : start + count]
            assert lane.pool.reserve(kv, start + count)
            chunk = Chunk(kv, [first], Draft(draft) if draft else None, True)
            rows.append(lane.runner.run(lane.builder.build([chunk])).logits)
            start = kv.num_computed_tokens = start + count
            evict_blocks(lane.pool, lane.stores, kv)
        full = len(token_ids) // lane.pool.block_size
        left = [index for index, block in enumerate(kv.block_tables[0][:full]) if block >= 0]
    finally:
        lane.pool.release(kv)
    return torch.cat(rows), left
