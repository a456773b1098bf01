"""The core's attention: a copy of the visible keys and values of every sequence, and one softmax with a mask.

It is short and reads any KV store, so it is the reference for attention plugins. A token sees the stored tokens of its sequence
from its `window_start` on, up to itself; a draft token sees of the draft only its ancestors and itself. With sinks, a token sees
the first tokens before its window with a second query. A single softmax covers both: the query is [q, sink_q] of size 2 D, the
keys are [k, 0] for the window and [0, k] for the sinks. Shapes: q, sink_q [T, H, D]; copied KV [Hkv, S, D]; H = Hkv * G.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.kv.store import KVStore
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.run.batch import Batch, Indices

Mask = npt.NDArray[np.bool_]


class Read(NamedTuple):
    """Tokens `[begin, end)` of a batch, and the slots [S] that they read.

    seen: [end - begin, S] bool, whether the token of the row sees the slot of the column; None = every token sees all slots.
    num_sinks: the first slots are of sinks.
    """

    begin: int
    end: int
    slots: Tensor
    seen: Tensor | None
    num_sinks: int


class PlainAttention:
    """Serves every model, device and KV store."""

    formats = None
    reads_sinks = True

    def __init__(self, context: BuildContext) -> None:
        self.scale, self.device = context.config.attention_scale, context.device

    def prepare(self, batch: Batch, group: int) -> list[Read]:
        part, size = batch.groups[group], batch.block_size
        positions, parents = batch.positions.numpy(), batch.parents.numpy()
        table, starts = part.block_table.numpy(), part.window_start.numpy()
        reads = []
        for row, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
            own = slice(begin, end)
            first, low = int(positions[begin]), int(starts[own].min())
            sinks, window = np.arange(min(part.num_sinks, int(starts[own].max()))), np.arange(low, first + end - begin)
            keys = np.concatenate((sinks, window))
            slots = table[row, keys // size].astype(np.int64) * size + keys % size
            seen = None
            if end - begin > 1:
                mask = visible_keys(first, window, positions[own], parents[own] - begin, starts[own])
                mask = np.concatenate((sinks[None] < starts[own][:, None], mask), 1)
                seen = torch.from_numpy(mask).to(self.device)
            reads.append(Read(begin, end, torch.from_numpy(slots).to(self.device), seen, len(sinks)))
        return reads

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: KVStore,
        layer: int,
        reads: list[Read],
        sink_q: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(q)
        for begin, end, slots, seen, num_sinks in reads:
            keys, values = store.gather(layer, slots, 1)
            queries = q[begin:end]
            if num_sinks and sink_q is not None:
                queries = torch.cat((queries, sink_q[begin:end]), -1)
                keys = torch.cat((keys, torch.zeros_like(keys)), -1)
                keys[:, :, :num_sinks] = keys[:, :, :num_sinks].roll(q.shape[-1], -1)
            attended = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None], keys, values, seen, scale=self.scale, enable_gqa=True
            )
            out[begin:end] = attended[0].transpose(0, 1)
        return out


def visible_keys(first: int, keys: Indices, positions: Indices, parents: Indices, starts: Indices) -> Mask:
    """[n, S] bool: the keys that the n new tokens of a sequence see.

    first: token index of the first new token. keys: token indices [S] of stored tokens and of new ones. positions, starts: [n],
    position and window start of the new tokens. parents: [n], index of a draft token's parent among the new tokens; below 0 for a
    known token.
    """
    own = keys - first
    is_own = own >= 0
    place = np.where(is_own, positions[np.maximum(own, 0)], keys)
    seen: Mask = place[None] >= starts[:, None]
    seen[:, is_own] &= ancestors(parents)[:, own[is_own]]
    return seen


def ancestors(parents: Indices) -> Mask:
    """[n, n] bool: whether the token of the row sees the token of the column.

    A token sees itself. A draft token also sees the tokens that its parent sees; any other token sees all tokens before it.
    """
    seen = np.tri(len(parents), dtype=bool)
    for index in is_in_tree(parents).nonzero()[0]:
        seen[index] = seen[parents[index]]
        seen[index, index] = True
    return seen


def is_in_tree(parents: Indices) -> Mask:
    """[n] bool: True from the first draft token whose parent is not the token before it."""
    drafted = parents >= 0
    return np.logical_or.accumulate(drafted & (parents != np.arange(len(parents)) - 1))
