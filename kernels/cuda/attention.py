"""Attention over paged KV: softmax(scale q K^T) V for a flat batch of prompts, decode steps and draft trees.

A program takes a tile of query rows (tokens of a sequence, times the query heads that share a KV head) and reads KV where it lies.
The keys of a token are cut into pieces at multiples of PIECE; each piece has an online softmax of its own, and pieces merge in
order, by the same formula in both modes: either a program walks all pieces (long queries), or each piece has a program (split K,
for decode) and a second kernel merges. A draft token sees of the draft the tokens in its bit mask. With sinks, a token reads the
first keys with a second query. A tile of quantized KV is a block: its rows are decoded into q's dtype in registers.
Shapes: q, out [T, H, D]; keys, values [Hkv, S, D]; H = Hkv * G. Moves 4 D bytes per key and tile in 16 bits (quantized: 2 B),
computes 4 D operations per key and query row. References: engine/run/attention.py, `kernels.attention_quant.decode_ref`.
Source: Dao et al. 2022, 2023 (FlashAttention); Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (PagedAttention)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.attention_quant import FIRST_OPEN
from pitlane.kernels.cuda.device import power_of_two
from pitlane.kernels.cuda.linear_fp8 import from_e4m3

PIECE = 1024  # keys
BLOCK_N = 32  # keys of a tile: more spill registers; also the tokens of a quantized block
OPEN: tl.constexpr = tl.constexpr(FIRST_OPEN // BLOCK_N)  # number of the first open block of quantized KV
MAX_DRAFT = 64  # tokens: the bits of a mask
FEW_TILES = 256  # fewer tiles than this leave multiprocessors idle: then every piece has a program


@triton.jit
def decoded(
    rows, block, columns,
    BITS: tl.constexpr, IS_KEY: tl.constexpr, DIM: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The 32 keys or values of a quantized block, [32, WIDTH] float32. rows: the rows of the head (kernels/attention_quant.py)."""
    CODES: tl.constexpr = DIM * BITS // 8
    inside = (columns < DIM)[None, :]
    line = (block * 32 + tl.arange(0, 32))[:, None] * BYTES
    if BITS == 0:
        return from_e4m3(tl.load(rows + line + columns[None, :], inside, 0)).to(tl.float32)
    if BITS == 8:
        code = tl.load(rows + line + columns[None, :], inside, 0)
    else:
        byte = tl.load(rows + line + (columns % (DIM // 2))[None, :], inside, 0)
        code = (byte >> (columns // (DIM // 2) * 4).to(tl.uint8)[None, :]) & 15
    pairs = rows.to(tl.pointer_type(tl.bfloat16))
    if IS_KEY:  # channel d has pair d of the block: every row holds DIM / 32 pairs
        at = ((block * 32 + columns // (DIM // 32)) * BYTES + CODES) // 2 + columns % (DIM // 32) * 2
        at = at[None, :]
    else:  # a token has a pair for 32 channels
        at = (line + CODES) // 2 + (columns // 32 * 2)[None, :]
    scale, zero = tl.load(pairs + at, inside, 0.0), tl.load(pairs + at + 1, inside, 0.0)
    return code.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)


@triton.jit
def tile_of(
    keys, values, row_keys, row_values, table, slot_stride, start, end, KIND: tl.constexpr,
    BITS: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_N, WIDTH] from key `start` on, and which of them exist. KIND: their type. BITS: see `attend`."""
    columns = tl.arange(0, WIDTH)
    inside = columns < DIM
    place = start + tl.arange(0, BLOCK_N)
    inside_text = place < end
    if BITS == 16:
        block = tl.load(table + place // SIZE, inside_text, 0)
        real = inside_text & (block >= 0)  # a dropped block may hold the KV of another sequence
        slot = tl.maximum(block, 0) * SIZE + place % SIZE
        held = real[:, None] & inside[None, :]
        at = slot[:, None] * slot_stride + columns[None, :]
        key, value = tl.load(keys + at, held, 0.0), tl.load(values + at, held, 0.0)
    else:  # the tile is a block: quantized, or open
        block = tl.load(table + start // SIZE)
        real = inside_text & (tl.zeros_like(place) + block >= 0)
        held = real[:, None] & inside[None, :]
        if block >= OPEN:
            at = ((block - OPEN) * SIZE + place % SIZE)[:, None] * slot_stride + columns[None, :]
            key, value = tl.load(keys + at, held, 0.0), tl.load(values + at, held, 0.0)
        else:
            block = tl.maximum(block, 0)
            key = decoded(row_keys, block, columns, BITS, True, DIM, BYTES, WIDTH)
            value = decoded(row_values, block, columns, BITS, False, DIM, BYTES, WIDTH)
            key, value = tl.where(held, key, 0.0).to(KIND), tl.where(held, value, 0.0).to(KIND)
    return key, value, place, real


@triton.jit
def walk(
    top, total, mixed, query, keys, values, row_keys, row_values, table, slot_stride, low, high, bits, draft, first, end, scale,
    BITS: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Take keys [first, end) into the online softmax (top, total, mixed) of a tile. low, high, bits: [M] of the rows."""
    for start in range(first, end, BLOCK_N):
        key, value, place, real = tile_of(
            keys, values, row_keys, row_values, table, slot_stride, start, end, query.dtype,
            BITS, BYTES, SIZE, DIM, WIDTH, BLOCK_N,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * scale
        known = (place[None, :] < high[:, None]) & (place[None, :] >= low[:, None])
        order = tl.minimum(tl.maximum(place - draft, 0), 63).to(tl.int64)
        drafted = (place[None, :] >= draft) & (((bits[:, None] >> order[None, :]) & 1) == 1)
        seen = real[None, :] & (known | drafted)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        part = tl.dot(weights.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        mixed = mixed * shrink[:, None] + part
        top = higher
    return top, total, mixed


@triton.jit
def merge(top, total, mixed, part_top, part_total, part_mixed):
    """Merge the softmax of a piece into the softmax of the pieces before it."""
    higher = tl.maximum(top, part_top)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    old, new = tl.exp(top - safe), tl.exp(part_top - safe)
    return higher, total * old + part_total * new, mixed * old[:, None] + part_mixed * new[:, None]


@triton.jit
def attention_kernel(
    q, sink_q, keys, values, row_keys, row_values, out, partial, tiles, table, lows, highs, masks, drafts, ends,
    q_stride, sink_stride, head_stride, slot_stride, row_stride, table_stride, num_pieces, scale, num_sinks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
    SPLIT: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """tiles: [n, 3] of sequence, first token, end. table: block tables. drafts, ends: [B], first draft key and end of all keys."""
    tile, kv_head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(tiles + tile * 3)
    begin = tl.load(tiles + tile * 3 + 1)
    stop = tl.load(tiles + tile * 3 + 2)
    row = tl.arange(0, ROWS)
    token = begin + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (token < stop) & (row < TOKENS * GROUP)
    columns = tl.arange(0, WIDTH)
    held = valid[:, None] & (columns < DIM)[None, :]
    low = tl.load(lows + token, valid, 0)
    high = tl.load(highs + token, valid, 0)
    bits = tl.load(masks + token, valid, 0)
    draft = tl.load(drafts + seq)
    end = tl.load(ends + seq)
    query = tl.load(q + token.to(tl.int64)[:, None] * q_stride + head[:, None] * DIM + columns[None, :], held, 0.0)
    keys += kv_head.to(tl.int64) * head_stride
    values += kv_head.to(tl.int64) * head_stride
    row_keys += kv_head.to(tl.int64) * row_stride
    row_values += kv_head.to(tl.int64) * row_stride
    table += seq.to(tl.int64) * table_stride
    # keys before the lowest window and behind the last token of the tile are seen by no row
    lowest = tl.min(tl.where(valid, low, end), 0)
    highest = tl.minimum(end, tl.maximum(tl.max(tl.where(valid, high, 0), 0), tl.where(tl.max(bits, 0) != 0, end, 0)))
    highest = tl.where(tl.min(bits, 0) != 0, end, highest)  # bit 63 is the sign
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    if SINKS:  # noqa: SIM102 (a constant, then a value)
        if piece == 0:
            second = tl.load(
                sink_q + token.to(tl.int64)[:, None] * sink_stride + head[:, None] * DIM + columns[None, :], held, 0.0
            )
            none = tl.zeros([ROWS], tl.int64)
            top, total, mixed = walk(
                top, total, mixed, second, keys, values, row_keys, row_values, table, slot_stride, none,
                tl.minimum(low, num_sinks), none, end, 0, tl.minimum(num_sinks, tl.max(low, 0)), scale,
                BITS, BYTES, SIZE, DIM, WIDTH, BLOCK_N, EXACT,
            )  # fmt: skip
    if SPLIT:
        first = tl.maximum(piece * PIECE, lowest // BLOCK_N * BLOCK_N)
        last = tl.minimum(piece * PIECE + PIECE, highest)
        part_top = tl.full([ROWS], float("-inf"), tl.float32)
        part_total = tl.zeros([ROWS], tl.float32)
        part_mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        part_top, part_total, part_mixed = walk(
            part_top, part_total, part_mixed, query, keys, values, row_keys, row_values, table, slot_stride, low,
            high, bits, draft, first, last, scale, BITS, BYTES, SIZE, DIM, WIDTH, BLOCK_N, EXACT,
        )  # fmt: skip
        top, total, mixed = merge(top, total, mixed, part_top, part_total, part_mixed)
        place = (token.to(tl.int64) * HEADS + head) * num_pieces + piece
        tl.store(partial + place * (DIM + 2), top, valid)
        tl.store(partial + place * (DIM + 2) + 1, total, valid)
        tl.store(partial + place[:, None] * (DIM + 2) + 2 + columns[None, :], mixed, held)
    else:
        for index in range(lowest // PIECE, tl.cdiv(highest, PIECE)):
            part_top = tl.full([ROWS], float("-inf"), tl.float32)
            part_total = tl.zeros([ROWS], tl.float32)
            part_mixed = tl.zeros([ROWS, WIDTH], tl.float32)
            first = tl.maximum(index * PIECE, lowest // BLOCK_N * BLOCK_N)
            last = tl.minimum(index * PIECE + PIECE, highest)
            part_top, part_total, part_mixed = walk(
                part_top, part_total, part_mixed, query, keys, values, row_keys, row_values, table, slot_stride, low,
                high, bits, draft, first, last, scale,
                BITS, BYTES, SIZE, DIM, WIDTH, BLOCK_N, EXACT,
            )  # fmt: skip
            top, total, mixed = merge(top, total, mixed, part_top, part_total, part_mixed)
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        place = (token.to(tl.int64) * HEADS + head)[:, None] * DIM + columns[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), held)


@triton.jit
def merge_kernel(partial, out, num_pieces, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the pieces of a query row, in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < DIM
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([1, WIDTH], tl.float32)
    for piece in range(num_pieces):
        at = partial + (row * num_pieces + piece) * (DIM + 2)
        part_top = tl.load(at + tl.zeros([1], tl.int32))
        part_total = tl.load(at + 1 + tl.zeros([1], tl.int32))
        part_mixed = tl.load(at + 2 + columns[None, :], inside[None, :], 0.0)
        top, total, mixed = merge(top, total, mixed, part_top, part_total, part_mixed)
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row * DIM + columns[None, :], result.to(out.dtype.element_ty), inside[None, :])


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


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Reads,
    scale: float,
    sink_q: Tensor | None = None,
    rows: Tensor | None = None,
    bits: int = 16,
) -> Tensor:
    """Return out [T, H, D] of q [T, H, D], whose tokens may be strided, over keys and values [Hkv, S, D].

    rows: quantized KV [2, Hkv, S, B] uint8 of `bits` 8 or 4, or 0 for fp8, as in kernels/attention_quant.py; then blocks from
    OPEN on lie in keys and values, and D is a multiple of 32.
    """
    num_tokens, heads, dim = q.shape
    kv_heads = keys.shape[0]
    if keys[0].numel() >= 2**31 or (rows is not None and rows[0, 0].numel() >= 2**31):
        raise ValueError(f"a head has {keys.shape[1]} slots of {dim} values; the kernel counts up to 2^31 values")
    if keys.shape != values.shape or keys.shape[2] != dim or heads % kv_heads:
        raise ValueError(f"shapes do not fit: q {q.shape}, keys {keys.shape}, values {values.shape}")
    if q.stride()[1:] != (dim, 1) or keys.stride() != values.stride() or keys.stride(2) != 1:
        raise ValueError(f"heads must be contiguous, got strides {q.stride()}, {keys.stride()}, {values.stride()}")
    if sink_q is not None and (sink_q.shape != q.shape or sink_q.stride()[1:] != (dim, 1)):
        raise ValueError(f"sink_q must be like q, got {sink_q.shape} with strides {sink_q.stride()}")
    if rows is not None:
        _check_rows(rows, bits, q, keys, reads.block_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sinks, exact, split = sink_q is not None, q.dtype == torch.float32, reads.split
    width = 0 if rows is None else rows.shape[3]
    fixed = constants(
        heads, heads // kv_heads, reads.block_size, dim, reads.tokens, split, sinks=sinks, exact=exact, bits=bits, width=width
    )  # fmt: skip
    pieces = reads.num_pieces if split else 1
    size = num_tokens * heads * pieces * (dim + 2) if split else 0
    partial = torch.empty(size, dtype=torch.float32, device=q.device)
    second, (row_keys, row_values) = q if sink_q is None else sink_q, (q, q) if rows is None else rows
    attention_kernel[(len(reads.tiles), kv_heads, pieces)](
        q, second, keys, values, row_keys, row_values, out, partial, reads.tiles, reads.table, reads.lows, reads.highs,
        reads.masks, reads.drafts, reads.ends, q.stride(0), second.stride(0), keys.stride(0), keys.stride(1),
        row_keys.stride(0), reads.table.stride(0), pieces, scale, reads.num_sinks, **fixed, **launch(fixed["ROWS"]),
    )  # fmt: skip
    if split:
        merge_kernel[(num_tokens * heads,)](partial, out, pieces, DIM=dim, WIDTH=fixed["WIDTH"], num_warps=1)
    return out


def _check_rows(rows: Tensor, bits: int, q: Tensor, keys: Tensor, block_size: int) -> None:
    kv_heads, _, dim = keys.shape
    width = dim * bits // 8 + dim // 8 if bits else dim
    if bits not in (0, 4, 8) or dim % 32 or block_size != BLOCK_N or keys.dtype != q.dtype:
        raise ValueError(
            f"quantized KV needs bits 8, 4 or 0, heads of a multiple of 32, blocks of {BLOCK_N} tokens and open blocks in q's "
            f"dtype, got bits {bits}, heads of {dim}, blocks of {block_size}, {keys.dtype} and {q.dtype}"
        )
    if rows.dtype != torch.uint8 or rows.shape[:2] != (2, kv_heads) or rows.shape[3] != width:
        raise ValueError(f"rows must be uint8 [2, {kv_heads}, S, {width}], got {rows.dtype} {list(rows.shape)}")
    if rows.stride()[2:] != (width, 1):
        raise ValueError(f"rows of a head must follow each other, got strides {rows.stride()}")


def constants(
    heads: int,
    group: int,
    block_size: int,
    dim: int,
    tokens: int,
    split: bool,
    *,
    sinks: bool,
    exact: bool,
    bits: int = 16,
    width: int = 0,
) -> dict[str, Any]:
    """The constants of a compiled attention_kernel. exact: products of float32 are not rounded. width: bytes of a row."""
    padded, rows = max(16, power_of_two(dim)), max(16, power_of_two(tokens * group))
    return {
        "HEADS": heads,
        "GROUP": group,
        "BITS": bits,
        "BYTES": width,
        "SIZE": block_size,
        "DIM": dim,
        "WIDTH": padded,
        "TOKENS": tokens,
        "ROWS": rows,
        "BLOCK_N": BLOCK_N,
        "PIECE": PIECE,
        "SPLIT": split,
        "SINKS": sinks,
        "EXACT": exact,
    }


def tile_rows(longest: int, dim: int) -> int:
    """Query rows of a tile, if `longest` is the largest number of tokens of a sequence."""
    if longest <= 16:
        return 16
    return 64 if dim <= 64 else 32


def launch(rows: int) -> dict[str, int]:
    """Warps and stages of attention_kernel, so that it spills no registers. Not tuned on a GPU yet."""
    return {"num_warps": 8 if rows > 16 else 4, "num_stages": 2}
