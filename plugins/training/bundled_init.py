"""Start weights that can already copy: a previous-token head, and heads that continue an earlier match (induction heads).

Random weights spend millions of tokens before copying appears; on two CPU cores that is the whole budget. So two heads of the
first layer start by attending one and two tokens back (RoPE phases acting on one constant embedding dimension) and write what
they read into their own subspaces; in each later layer one head per KV head starts by looking for places whose previous token
is the current one, and copies what stands there. All of it is ordinary Llama weights and trained on like any other.
Circuit: Olsson et al. 2022, "In-context learning and induction heads". Weights are [out_features, in_features].
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING_STD, CONSTANT = 0.05, 4.0
POSITION_GAIN, MATCH_GAIN, CARRY, COPY = 9.0, 2.0, 0.09, 0.2
LOW_FREQUENCY = 12


def _orthonormal(rows: int, columns: int) -> Tensor:
    """Return orthonormal rows that ignore the constant dimension."""
    basis = torch.linalg.qr(torch.randn(columns - 1, rows))[0].T
    return torch.cat([torch.zeros(rows, 1), basis], dim=1)


@torch.no_grad()
def init_copying(model: LlamaForCausalLM) -> None:
    """Overwrite some of the model's random weights in place; heads must be 64 wide and KV heads two or more."""
    config = model.config
    hidden, head, half = config.hidden_size, config.head_dim, config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, 0] = CONSTANT * EMBEDDING_STD
    model.model.norm.weight.fill_(2.0)
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    read = _orthonormal(head, hidden)
    written = []
    for offset in (1, 2):
        attention, kv, query = layers[0].self_attn, offset - 1, (offset - 1) * group
        angles = offset * frequencies[:8]
        rows = torch.arange(8)
        attention.k_proj.weight[kv * head + rows, 0] = POSITION_GAIN / CONSTANT
        attention.q_proj.weight[query * head + rows, 0] = POSITION_GAIN / CONSTANT * angles.cos()
        attention.q_proj.weight[query * head + half + rows, 0] = -POSITION_GAIN / CONSTANT * angles.sin()
        attention.v_proj.weight[kv * head : (kv + 1) * head] = read
        target = _orthonormal(head, hidden)
        attention.o_proj.weight[:, query * head : (query + 1) * head] = CARRY * target.T
        written.append(target)
    low = torch.cat([torch.arange(LOW_FREQUENCY, half), torch.arange(half + LOW_FREQUENCY, head)])
    for layer in layers[1:]:
        attention = layer.self_attn
        for kv in range(2):
            query = kv * group
            attention.q_proj.weight[query * head + low] = MATCH_GAIN * read[: len(low)]
            attention.k_proj.weight[kv * head + low] = MATCH_GAIN * written[0][: len(low)]
            copied = _orthonormal(head, hidden)
            attention.v_proj.weight[kv * head : (kv + 1) * head] = copied
            attention.o_proj.weight[:, query * head : (query + 1) * head] = COPY * copied.T
