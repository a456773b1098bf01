"""Attention over paged KV: softmax(scale q K^T) V for a flat batch of prompts, decode steps and draft trees.

A program takes a tile of query rows (tokens of a sequence, times the query heads that share a KV head) and reads KV where it lies.
The keys of a token are cut into pieces at multiples of PIECE; each piece has an online softmax of its own, and pieces merge in
order, by the same formula in both modes: either a program walks all pieces (long queries), or each piece has a program (split K,
for decode) and a second kernel merges. A draft token sees of the draft the tokens in its bit mask. With sinks, a token reads the
first keys with a second query. A tile of quantized KV is a block: its rows are decoded into q's dtype in registers. From sm_90 on,
long prompts without windows run a kernel with tensor descriptors (attention_prefill.py), with sums in another order.
Shapes: q, out [T, H, D]; keys, values [Hkv, S, D]; H = Hkv * G. Moves 4 D bytes per key and tile in 16 bits (quantized: 2 B),
computes 4 D operations per key and query row. References: engine/run/attention.py, `kernels.attention_quant.decode_ref`.
Source: Dao et al. 2022, 2023 (FlashAttention); Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (PagedAttention)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pitlane.kernels.cuda import attention_prefill, attention_reads
from pitlane.kernels.cuda.attention_kernel import attention_kernel, merge_kernel
from pitlane.kernels.cuda.attention_reads import BLOCK_N, Reads
from pitlane.kernels.cuda.device import power_of_two


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
    if attention_prefill.serves(q, keys, values, reads, is_dense=rows is None):
        return attention_prefill.attend(q, keys, values, reads, scale)
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
        row_keys.stride(0), reads.table.stride(0), pieces, scale, reads.num_sinks, **fixed, **reads.form.launch,
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
        "PIECE": attention_reads.PIECE,
        "SPLIT": split,
        "SINKS": sinks,
        "EXACT": exact,
    }
