"""Arranges a batch for quantized KV: a token reads its own block in full precision, and every earlier block in the store's format.

The tokens of a sequence are split at the ends of blocks. Every part becomes a sequence of its own in the batch: its block table
names the open copy of its block, and the quantized form of all earlier blocks. So any attention serves, and a token's KV does not
depend on the other tokens of the forward. A draft tree is one part: the engine cuts it at the end of the block of its first token.
A block that a part completes is quantized within the forward if a later part reads it, else before its next reader or when it is
sealed.

A group may leave dropped blocks out of its block tables. There, the place of a token in the table is not its position. Whole blocks
are left out, so a part ends at the same token in all groups. The second query of a token reads its sinks in the same way: in full
precision if they lie in the token's own block, else in the store's format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from pitlane import Batch, Forward, GroupBatch, Output
from pitlane.plugins.kv_quant.formats import TOKENS
from pitlane.plugins.kv_quant.store import QuantizedKV


class Part(NamedTuple):
    """Tokens `[begin, end)` of the batch, of sequence `row`. first: position of the first token, or its place in a block table."""

    row: int
    begin: int
    end: int
    first: int
    is_tree: bool

    @property
    def stop(self) -> int:
        return self.first + self.end - self.begin

    @property
    def blocks(self) -> range:
        """Indices in the block table of the blocks that the part writes."""
        return range(self.first // TOKENS, (self.stop - 1) // TOKENS + 1)

    @property
    def completes(self) -> bool:
        return not self.is_tree and self.stop % TOKENS == 0


class QuantizedForward:
    """The forward of a lane, over quantized stores."""

    def __init__(self, forward: Forward, stores: Sequence[QuantizedKV]) -> None:
        self.forward, self.stores = forward, stores

    def __call__(self, batch: Batch) -> Output:
        return self.forward(arranged(batch, self.stores) if batch.num_tokens else batch)


def arranged(batch: Batch, stores: Sequence[QuantizedKV]) -> Batch:
    """Return the batch with split sequences, and open the blocks that it writes. stores: of all KV groups."""
    parts = list(_parts(batch))
    ends = torch.tensor([0, *(part.end for part in parts)])
    parents = batch.parents.clone()
    for part in parts:
        if not part.is_tree:  # a part of a chain sees all tokens before it, as known tokens do
            parents[part.begin : part.end] = -1
    groups = tuple(_group(group, store, parts) for group, store in zip(batch.groups, stores, strict=True))
    return replace(batch, query_start=ends, parents=parents, groups=groups)


def _parts(batch: Batch) -> Iterator[Part]:
    positions, parents = batch.positions.tolist(), batch.parents.tolist()
    for row, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
        first = positions[begin]
        if any(parents[index] not in (-1, index - 1) for index in range(begin, end)):
            yield Part(row, begin, end, first, True)
            continue
        while begin < end:
            stop = min(end, begin + TOKENS - first % TOKENS)
            yield Part(row, begin, stop, first, False)
            first, begin = first + stop - begin, stop


def _group(group: GroupBatch, store: QuantizedKV, parts: Sequence[Part]) -> GroupBatch:
    if group.places is not None:
        places = group.places.tolist()
        parts = [part._replace(first=places[part.begin]) for part in parts]
    table = group.block_table.numpy()[[part.row for part in parts]]  # a copy
    written = [table[row, part.blocks.start : part.blocks.stop].tolist() for row, part in enumerate(parts)]
    store.quantize_read(table, {block for blocks in written for block in blocks})
    slots: list[int] = []
    closing = []
    for row, (part, blocks) in enumerate(zip(parts, written, strict=True)):
        start = part.blocks.start
        opened = [store.open(block, index * TOKENS >= part.first) for index, block in enumerate(blocks, start)]
        table[row, start : part.blocks.stop] = opened
        slots += [opened[at // TOKENS - start] * TOKENS + at % TOKENS for at in range(part.first, part.stop)]
        if part.completes and row + 1 < len(parts) and parts[row + 1].row == part.row:
            closing.append(blocks[-1])
    store.close_in_forward(closing)
    return replace(group, slots=torch.tensor(slots), block_table=torch.from_numpy(table))
