"""Attention for long queries on a GPU with tensor descriptors (sm_90 and later): the function of attention_kernel.py.

Serves batches without windows, sinks and draft trees, over KV of 16 bits in blocks of BLOCK_N tokens: a descriptor then copies the
keys of a block into shared memory, without a thread that computes addresses. A persistent grid: a program takes tile after tile of
query rows, the tiles with many keys first. A step of the online softmax takes two blocks; pieces are those of attention_kernel.py.
Keys that every row of a tile sees need no mask. Warps are not specialised: Triton 3.9 fails to compile such a loop for sm_90.
Shapes: as in attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pitlane.kernels.cuda import attention_reads
from pitlane.kernels.cuda.attention_kernel import merge
from pitlane.kernels.cuda.attention_reads import BLOCK_N, Reads
from pitlane.kernels.cuda.device import is_aligned, num_programs


@triton.jit
def softmax_step(top, total, mixed, scores, more_scores, value, more_value, EXACT: tl.constexpr):
    """Take the scores and values of two blocks into the online softmax (top, total, mixed)."""
    higher = tl.maximum(top, tl.maximum(tl.max(scores, 1), tl.max(more_scores, 1)))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights, more_weights = tl.exp(scores - safe[:, None]), tl.exp(more_scores - safe[:, None])
    shrink = tl.exp(top - safe)
    total = total * shrink + (tl.sum(weights, 1) + tl.sum(more_weights, 1))
    mixed *= shrink[:, None]
    mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee" if EXACT else "tf32")
    mixed = tl.dot(more_weights.to(value.dtype), more_value, mixed, input_precision="ieee" if EXACT else "tf32")
    return higher, total, mixed


@triton.jit
def steps(
    top, total, mixed, query, keys, values, table, kv_head, high, first, end, scale,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Take keys [first, end) into the online softmax (top, total, mixed). MASKED: a row sees the keys before `high`."""
    for start in range(first, end, 2 * BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        block = tl.load(table + start // BLOCK_N)
        if MASKED:  # the last step may have one tile: the block table then lacks the second block
            more_block = tl.load(table + start // BLOCK_N + 1, start + BLOCK_N < end, 0)
        else:
            more_block = tl.load(table + start // BLOCK_N + 1)
        key = keys.load([kv_head, block * BLOCK_N, 0]).reshape(BLOCK_N, DIM)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * scale
        more_key = keys.load([kv_head, more_block * BLOCK_N, 0]).reshape(BLOCK_N, DIM)
        more_scores = tl.dot(query, tl.trans(more_key), input_precision="ieee" if EXACT else "tf32") * scale
        if MASKED:
            scores = tl.where(place[None, :] < high[:, None], scores, float("-inf"))
            more_scores = tl.where(place[None, :] + BLOCK_N < high[:, None], more_scores, float("-inf"))
        value = values.load([kv_head, block * BLOCK_N, 0]).reshape(BLOCK_N, DIM)
        more_value = values.load([kv_head, more_block * BLOCK_N, 0]).reshape(BLOCK_N, DIM)
        top, total, mixed = softmax_step(top, total, mixed, scores, more_scores, value, more_value, EXACT)
    return top, total, mixed


@triton.jit
def prefill_kernel(
    q, keys, values, out, tiles, table, highs, num_tiles, q_stride, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """keys, values: descriptors of [Hkv, S, D] with tiles [1, BLOCK_N, D]. tiles, table, highs: of `Reads`."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    for index in range(tl.program_id(0), num_tiles * KV_HEADS, tl.num_programs(0)):
        tile = tiles + (num_tiles - 1 - index // KV_HEADS) * 3
        kv_head = index % KV_HEADS
        own_table = table + tl.load(tile).to(tl.int64) * table_stride
        token = tl.load(tile + 1) + row // GROUP
        head = kv_head * GROUP + row % GROUP
        valid = (token < tl.load(tile + 2)) & (row < TOKENS * GROUP)
        high = tl.load(highs + token, valid, 0).to(tl.int32)
        highest = tl.max(high, 0)
        unmasked = tl.min(tl.where(valid, high, highest), 0) // (2 * BLOCK_N) * (2 * BLOCK_N)
        at = token.to(tl.int64)[:, None] * q_stride + head[:, None] * DIM + columns[None, :]
        query = tl.load(q + at, valid[:, None], 0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DIM], tl.float32)
        for first in range(0, highest, PIECE):
            last = tl.minimum(first + PIECE, highest)
            between = tl.maximum(first, tl.minimum(last, unmasked))
            part_top = tl.full([ROWS], float("-inf"), tl.float32)
            part_total = tl.zeros([ROWS], tl.float32)
            part_mixed = tl.zeros([ROWS, DIM], tl.float32)
            part_top, part_total, part_mixed = steps(
                part_top, part_total, part_mixed, query, keys, values, own_table, kv_head, high, first, between, scale,
                DIM, BLOCK_N, False, EXACT,
            )  # fmt: skip
            part_top, part_total, part_mixed = steps(
                part_top, part_total, part_mixed, query, keys, values, own_table, kv_head, high, between, last, scale,
                DIM, BLOCK_N, True, EXACT,
            )  # fmt: skip
            top, total, mixed = merge(top, total, mixed, part_top, part_total, part_mixed)
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        at = (token.to(tl.int64) * HEADS + head)[:, None] * DIM + columns[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), valid[:, None])


def serves(q: Tensor, keys: Tensor, values: Tensor, reads: Reads, *, is_dense: bool) -> bool:
    """Whether `attend` takes these tensors. is_dense: KV of 16 bits, not quantized rows."""
    fits = is_dense and reads.long_tiles is not None and keys.dtype == q.dtype and q.element_size() == 2
    return fits and is_aligned(keys) and is_aligned(values)


def attend(q: Tensor, keys: Tensor, values: Tensor, reads: Reads, scale: float) -> Tensor:
    """As `attention.attend`, for tensors that this kernel serves."""
    assert reads.long_tiles is not None, "the batch has no tiles for long queries"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    fixed = constants(q.shape[1], keys.shape[0], q.shape[2], reads.long_tokens, exact=q.dtype == torch.float32)
    tile = [1, BLOCK_N, q.shape[2]]
    pages = [TensorDescriptor.from_tensor(tensor, tile) for tensor in (keys, values)]
    num_tiles = len(reads.long_tiles)
    programs = min(num_tiles * keys.shape[0], num_programs(q.device))
    prefill_kernel[(programs,)](
        q, *pages, out, reads.long_tiles, reads.table, reads.highs, num_tiles, q.stride(0), reads.table.stride(0), scale,
        **fixed, **launch(),
    )  # fmt: skip
    return out


def constants(heads: int, kv_heads: int, dim: int, tokens: int, *, exact: bool) -> dict[str, Any]:
    """The constants of a compiled prefill_kernel. tokens: of a tile. exact: products of float32 are not rounded."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "TOKENS": tokens,
        "ROWS": attention_reads.LONG_ROWS[dim],
        "BLOCK_N": BLOCK_N,
        "PIECE": attention_reads.PIECE,
        "EXACT": exact,
    }


def launch() -> dict[str, int]:
    """Warps and stages of prefill_kernel, so that it spills no registers. Not tuned on a GPU yet."""
    return {"num_warps": 8, "num_stages": 2}
