"""How the tokens of a step read the KV of a group, as tensors for the kernels of attention (attention.py).

Knows the fields of a `pitlane.Batch`, and no kernel. The tensors are made on the host, and copied to the device once per step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pitlane.kernels.cuda import tuning
from pitlane.kernels.cuda.device import has_descriptors
from pitlane.kernels.cuda.tuning import Form

PIECE = 1024  # keys
MAX_DRAFT = 64  # tokens: the bits of a mask
BLOCK_N = 32  # keys of a tile: more spill registers; also the tokens of a quantized block
LONG = 128  # a step with a sequence of at least this number of tokens may run attention_prefill.py
LONG_ROWS = {
    64: 128,
    128: 64,
}  # query rows of a tile of attention_prefill.py, by size of heads; other sizes spill registers
FEW_TILES = 256  # fewer tiles than this leave multiprocessors idle: then every piece has a program


class Reads(NamedTuple):
    """How the tokens of a step read the KV of a group; the tensors lie on the device.

    tiles: [n, 3] int32, sequence, first token, end. lows: [T] int64, first visible key. highs: [T] int64, end of the visible keys
    before the draft. masks: [T] int64, bit i = the token sees draft token i. drafts, ends: [B] int64, key index of the first draft
    token, and the number of keys. tokens: tokens of a tile. num_pieces: pieces of the longest sequence. split: see attention.py.
    form: rows, warps and stages of a tile. long_tiles, long_tokens: tiles of attention_prefill.py; None if that kernel does not
    serve the batch.
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
    form: Form
    long_tiles: Tensor | None = None
    long_tokens: int = 0


def reads_of(
    batch: Any, group: int, heads: tuple[int, int], dim: int, device: torch.device, form: Form | None = None
) -> Reads:
    """Plan the reads of a `pitlane.Batch`, whose tensors lie on the host.

    heads: of queries, and of keys and values. form: of the kernel with pointers, for tuning. Raises ValueError if a draft has more
    than MAX_DRAFT tokens.
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
    is_free, form = form is None, form or tuning.chosen(f"attention D {dim}", longest, device)
    tokens = max(1, form.block_m * heads[1] // heads[0])
    tiles = _tiles(query_start, tokens)
    num_pieces = max(1, -(-int(ends.max()) // PIECE))
    table = part.block_table.numpy()
    is_plain = is_free and longest >= LONG and not part.num_sinks and not starts.any() and not masks.any()
    long_tokens = LONG_ROWS.get(dim, 0) * heads[1] // heads[0]
    long_tiles = None

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    if is_plain and long_tokens and batch.block_size == BLOCK_N and has_descriptors(device):
        used = -(-ends // BLOCK_N)
        if not (table.min(1, initial=0, where=np.arange(table.shape[1]) < used[:, None]) < 0).any():
            long_tiles = moved(np.array(_tiles(query_start, long_tokens), np.int32))
    return Reads(
        tiles=moved(np.array(tiles, np.int32)),
        table=moved(table),
        lows=moved(starts),
        highs=moved(highs),
        masks=moved(masks),
        drafts=moved(drafts),
        ends=moved(ends),
        block_size=batch.block_size,
        tokens=tokens,
        num_pieces=num_pieces,
        num_sinks=part.num_sinks,
        # the parts of a prompt would take gigabytes
        split=num_pieces > 1 and longest <= 16 and len(tiles) * heads[1] < FEW_TILES,
        form=form,
        long_tiles=long_tiles,
        long_tokens=long_tokens,
    )


def _tiles(query_start: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """Cut the tokens of every sequence into tiles: sequence, first token, end."""
    return [
        (row, token, min(token + tokens, end))
        for row, (begin, end) in enumerate(pairwise(query_start))
        for token in range(begin, end, tokens)
    ]
