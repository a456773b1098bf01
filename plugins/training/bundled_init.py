"""Start weights that can already look back: heads that gather the last tokens, and heads that continue an earlier match.

From random weights, copying appears only after millions of tokens, which on two CPU cores is the whole budget. So the four
heads of the first layer start by reading one, two and three tokens back and the mean of the last dozen (RoPE phases acting on
one constant embedding dimension), and write sketches of what they read into subspaces of their own. In every later layer one
head per KV head starts by looking for a place with the same recent tokens, and copies what stands there. All of it is ordinary
Llama weights, trained on like any other. Circuit: Olsson et al. 2022, "In-context learning and induction heads".
Weights are [out_features, in_features]; needs four heads of 64 on two KV heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING_STD, CONSTANT, NORM_GAIN = 0.05, 4.0, 2.0
POSITION_GAIN = 9.0
# Per head: offset, first frequency used, gain of what is written.
GATHERING = (
    (1.0, 0, 0.09),
    (2.0, 0, 0.09),
    (3.0, 0, 0.09),
    (5.0, 5, 0.22),
)
HEAD, KV_HEADS, GROUP, SKETCH = 64, 2, 2, 48
LOW_FREQUENCY, HIGH_FREQUENCY = 14, 8
MATCH_GAIN, COPIES = 2.5, (0.6, 0.15, 0.1)


def _orthonormal(rows: int, columns: int) -> Tensor:
    """Return orthonormal rows that ignore the constant dimension."""
    basis = torch.linalg.qr(torch.randn(columns - 1, rows))[0].T
    return torch.cat([torch.zeros(rows, 1), basis], dim=1)


def _init_gathering(model: LlamaForCausalLM, read: Tensor, written: list[Tensor]) -> None:
    attention = model.model.layers[0].self_attn
    half = HEAD // 2
    theta = model.config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(HIGH_FREQUENCY) / half)
    rows = torch.arange(HIGH_FREQUENCY)
    for kv in range(KV_HEADS):
        for start in (kv * HEAD, kv * HEAD + half):
            attention.k_proj.weight[start + rows] = 0.0
        attention.k_proj.weight[kv * HEAD + rows, 0] = POSITION_GAIN / CONSTANT
        attention.v_proj.weight[kv * HEAD : kv * HEAD + SKETCH] = read
    for query, (offset, first, carry) in enumerate(GATHERING):
        used = (rows >= first) * POSITION_GAIN / CONSTANT
        for start, phase in (
            (query * HEAD, (offset * frequencies).cos()),
            (query * HEAD + half, -(offset * frequencies).sin()),
        ):
            attention.q_proj.weight[start + rows] = 0.0
            attention.q_proj.weight[start + rows, 0] = used * phase
        attention.o_proj.weight[:, query * HEAD : query * HEAD + SKETCH] = carry * written[query].T


def _init_matching(model: LlamaForCausalLM, read: Tensor, written: list[Tensor]) -> None:
    """Match (this token, the one before) with (one before, two before), and (this token, the recent ones) likewise."""
    half = HEAD // 2
    low = torch.cat([torch.arange(LOW_FREQUENCY, half), torch.arange(half + LOW_FREQUENCY, HEAD)])
    middle = len(low) // 2
    one, two, _, recent = written
    sides = ((one, two, one), (one, recent, recent))
    for layer, copy in zip(model.model.layers[1:], COPIES, strict=True):
        attention = layer.self_attn
        for kv, (key_first, key_second, query_second) in enumerate(sides):
            head, query = kv * HEAD, kv * GROUP * HEAD
            attention.k_proj.weight[head + low[:middle]] = MATCH_GAIN * key_first[:middle]
            attention.k_proj.weight[head + low[middle:]] = MATCH_GAIN * key_second[:middle]
            attention.q_proj.weight[query + low[:middle]] = 1.5 * MATCH_GAIN * read[:middle]
            attention.q_proj.weight[query + low[middle:]] = MATCH_GAIN * query_second[:middle]
            copied = _orthonormal(HEAD, model.config.hidden_size)
            attention.v_proj.weight[head : head + HEAD] = copied
            attention.o_proj.weight[:, query : query + HEAD] = copy * (1.0 - 0.5 * kv) * copied.T


@torch.no_grad()
def init_copying(model: LlamaForCausalLM) -> None:
    """Overwrite some of the model's random weights in place."""
    hidden = model.config.hidden_size
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, 0] = CONSTANT * EMBEDDING_STD
    model.model.norm.weight.fill_(NORM_GAIN)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    read = _orthonormal(SKETCH, hidden)
    written = list(_orthonormal(SKETCH * len(GATHERING), hidden).split(SKETCH))
    _init_gathering(model, read, written)
    _init_matching(model, read, written)
