"""The kernels of attention over paged KV (attention.py): a program per tile of query rows and piece, and the merge of pieces.

A program reads the keys of a tile of BLOCK_N slots at a time, with pointers from the block table. A tile of quantized KV is a
block: its rows are decoded into q's dtype in registers. Shapes: as in attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pitlane.kernels.attention_quant import FIRST_OPEN
from pitlane.kernels.cuda.attention_reads import BLOCK_N
from pitlane.kernels.cuda.e4m3 import from_e4m3

OPEN: tl.constexpr = tl.constexpr(FIRST_OPEN // BLOCK_N)  # number of the first open block of quantized KV


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
