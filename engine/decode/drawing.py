"""Draws the tokens of all rows of a plan in one call, with the operation `sample` of a plugin.

The operation takes logits [R, V] where they lie, and lists of R values: noise keys, temperatures, top-k, top-p, min-p. So a step
moves a token id per row to the host, not the logits. The rules are those of sampling.py. Penalties and `adjust_logits`
come before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pitlane.engine.decode.rows import Rows
from pitlane.engine.decode.sampling import noise_key

SampleOp: TypeAlias = Callable[[Tensor, list[int], list[float], list[int], list[float], list[float]], Tensor]


def is_wanted(rows: Rows) -> bool:
    """Whether a row is sampled, from logits that an operation takes. A greedy row needs no noise."""
    if rows.logits.dtype == torch.float64:
        return False
    return any(seq.request.sampling.temperature > 0 for seq in rows.seqs)


def drawn(rows: Rows, sample: SampleOp) -> list[int]:
    """The token after every row [R]. Raises ValueError if the operation returns other numbers than token ids."""
    seqs = [rows.seqs[index] for index in rows.seq_index]
    params = [seq.request.sampling for seq in seqs]
    keys = [
        noise_key(seq.request.seed, sampling.sample_index, seq.num_tokens + len(rows.path(row)))
        for row, (seq, sampling) in enumerate(zip(seqs, params, strict=True))
    ]
    answer = sample(
        rows.logits,
        keys,
        [sampling.temperature for sampling in params],
        [sampling.top_k for sampling in params],
        [sampling.top_p for sampling in params],
        [sampling.min_p for sampling in params],
    )
    num_rows, vocab_size = rows.logits.shape
    tokens: list[int] = answer.tolist()
    if len(tokens) != num_rows or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"returned {tokens[:8]} for {num_rows} rows and a vocabulary of {vocab_size}")
    return tokens
