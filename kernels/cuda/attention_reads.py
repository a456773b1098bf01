"""How the tokens of a step read the KV of a group, as tensors for the kernels of attention (attention.py).

Knows the fields of a `pitlane.Batch`, and no kernel. The tensors are made on the host, and copied to the device once per step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PIECE = 1024  # keys
MAX_DRAFT = 64  # tokens: the bits of a mask
FEW_TILES = 256  # fewer tiles than this leave multiprocessors idle: then every piece has a program


class Reads(NamedTuple):
    """How the tokens of a step read the KV of a group; the tensors lie on the device.

    tiles: [n, 3] int32, sequence, first token, end. lows: [T] int64, first visible key. highs: [T] int64, end of the visible keys
    before the draft. masks: [T] int64, bit i = the token sees draft token i. drafts, ends: [B] int64, key index of the first draft
    token, and the number of keys. tokens: tokens of a tile. num_pieces: pieces of the longest sequence. split: see the module.
    """

    tiles: Tensor
    table: Tensor
    lows: Tensor
    highs: Tensor
    masks: Tensor
    drafts: Tensor
    ends: Tensor
    block_size: int
    tokens: int
    num_pieces: int
    num_sinks: int
    split: bool


def reads_of(batch: Any, group: int, heads: tuple[int, int], dim: int, device: torch.device) -> Reads:
    """Plan the reads of a `pitlane.Batch`, whose tensors lie on the host.

    heads: of queries, and of keys and values. Raises ValueError if a draft has more than MAX_DRAFT tokens.
    """
    part = batch.groups[group]
    positions, parents = batch.positions.numpy(), batch.parents.numpy()
    starts, query_start = part.window_start.numpy(), batch.query_start.tolist()
    highs, masks = positions + 1, np.zeros(len(positions), np.int64)
    drafts, ends = np.empty(len(query_start) - 1, np.int64), np.empty(len(query_start) - 1, np.int64)
    for row, (begin, end) in enumerate(pairwise(query_start)):
        first = int(positions[begin])
        drafted = np.flatnonzero(parents[begin:end] >= 0)
        count = int(drafted[0]) if len(drafted) else end - begin
        drafts[row], ends[row] = first + count, first + end - begin
        if end - begin - count > MAX_DRAFT:
            raise ValueError(f"a draft has {end - begin - count} tokens; the kernel takes up to {MAX_DRAFT}")
        paths: list[int] = []
        for index in range(begin + count, end):
            parent = int(parents[index]) - begin - count
            path = (paths[parent] if parent >= 0 else 0) | 1 << len(paths)
            paths.append(path)
            highs[index] = drafts[row]
            kept = (bit for bit in range(len(paths)) if path >> bit & 1)
            visible = sum(1 << bit for bit in kept if positions[begin + count + bit] >= starts[index])
            masks[index] = np.array(visible, np.uint64).astype(np.int64)
    longest = max(end - begin for begin, end in pairwise(query_start))
    tokens = max(1, tile_rows(longest, dim) * heads[1] // heads[0])
    tiles = [
        (row, token, min(token + tokens, end))
        for row, (begin, end) in enumerate(pairwise(query_start))
        for token in range(begin, end, tokens)
    ]
    num_pieces = max(1, -(-int(ends.max()) // PIECE))
    tensors = (np.array(tiles, np.int32), part.block_table.numpy(), starts, highs, masks, drafts, ends)
    moved = [torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True) for array in tensors]
    split = (
        num_pieces > 1 and longest <= 16 and len(tiles) * heads[1] < FEW_TILES
    )  # the parts of a prompt would take gigabytes
    return Reads._make((*moved, batch.block_size, tokens, num_pieces, part.num_sinks, split))


def tile_rows(longest: int, dim: int) -> int:
    """Query rows of a tile, if `longest` is the largest number of tokens of a sequence."""
    if longest <= 16:
        return 16
    return 64 if dim <= 64 else 32
