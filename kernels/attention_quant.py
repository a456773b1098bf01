"""Attention over quantized paged KV, read where it lies: the softmax of kernels/attention.py over rows of int8, int4 or fp8.

The keys and values of a piece are decoded into bfloat16 once for all its members, in a buffer that stays in the cache; then the
kernel goes on as for bfloat16 KV. A slot below FIRST_OPEN is a row [B] uint8, in blocks of 32 slots; attention_decoded.h in
kernels/cpu describes a row. A slot from FIRST_OPEN on is a key and a value [D] in bfloat16.
Per key of a task and KV head: moves 2 B bytes.
Source: Liu et al. 2024 (KIVI); the rest as in kernels/attention.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pitlane.kernels.attention import Parts, Seen, Slots, attend_ref, partial_results
from pitlane.kernels.attention import unavailable as bf16_unavailable
from pitlane.kernels.extension import cpu

FIRST_OPEN = 2**28
TOKENS = 32  # slots of a block
BITS = {"kv_quant_int8": 8, "kv_quant_int4": 4, "kv_quant_fp8": 0}  # by the format of the KV store


def decode_ref(rows: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """The reference for whole blocks: rows [2, Hkv, n * 32, B] -> keys, values [Hkv, n * 32, D] in float32."""
    if bits == 0:
        keys, values = rows.view(torch.float8_e4m3fn).float()
        return keys, values
    codes, rest = rows.split([dim * bits // 8, rows.shape[-1] - dim * bits // 8], -1)
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    pairs = (
        rest[..., : dim // 8].contiguous().view(torch.bfloat16).float().unflatten(-1, (-1, 2))
    )  # [2, Hkv, S, D / 32, 2]
    keys, values = codes.float()
    scale, zero = pairs[0].unflatten(1, (-1, TOKENS)).flatten(2, 3).repeat_interleave(TOKENS, 1).unbind(-1)
    value_scale, value_zero = pairs[1].repeat_interleave(32, 2).unbind(-1)
    return keys * scale + zero, values * value_scale + value_zero


def attend_quantized(q: Tensor, rows: Tensor, full: Tensor, parts: Parts, bits: int, scale: float, out: Tensor) -> None:
    """Write the rows of out [T, H, D] that `parts` names. q [T, H, D], rows [2, Hkv, S, B], full [2, Hkv, F, D]: keys, values.

    bits: 8 or 4, or 0 for fp8. q may have any stride of tokens. If `parts` names second queries, q is [2 T, H, D].
    """
    _, heads, dim = q.shape
    kv_heads = rows.shape[1]
    if full.dtype != torch.bfloat16 or rows.dtype != torch.uint8:
        raise ValueError(f"full must be bfloat16, rows uint8, got {full.dtype}, {rows.dtype}")
    if len(q) not in (len(out), 2 * len(out)) or full.shape[3] != dim:
        raise ValueError(f"shapes do not fit: q {q.shape}, rows {rows.shape}, full {full.shape}, out {out.shape}")
    partial = partial_results(q, out, (rows, full), parts)
    cpu.attention_quant(
        q.data_ptr(),
        *(tensor.data_ptr() for tensor in (rows[0], rows[1], full[0], full[1])),
        out.data_ptr(),
        partial.data_ptr(),
        *(tensor.data_ptr() for tensor in parts),
        len(parts.tasks),
        len(parts.rows),
        heads,
        kv_heads,
        dim,
        q.stride(0),
        rows.shape[3],
        rows.stride(1),
        full.stride(1),
        FIRST_OPEN,
        bits,
        torch.get_num_threads(),
        scale,
    )


def attend_quantized_ref(q: Tensor, rows: Tensor, full: Tensor, slots: Slots, bits: int, scale: float) -> Tensor:
    """The reference for one token: q [H, D] over `slots` -> [H, D]."""
    decoded = torch.stack(decode_ref(rows, q.shape[1], bits)).bfloat16()
    keys, values = torch.cat((decoded, full), 2)
    index = np.where(slots >= FIRST_OPEN, slots - FIRST_OPEN + rows.shape[2], slots).astype(np.int32)
    return attend_ref(q, keys, values, index, scale)


@cache
def unavailable(head_dim: int) -> str | None:
    """Why `attend_quantized` cannot run on this machine; None if it can. Compares it with the reference, once per head size."""
    reason = bf16_unavailable(head_dim)
    if reason is not None or not hasattr(cpu, "attention_quant"):
        return reason or "the C kernels are of an older version"
    generator = torch.Generator().manual_seed(0)
    for bits in BITS.values():
        q, rows, full = sample(head_dim, bits, generator)
        slots = np.concatenate((np.arange(32, 608), FIRST_OPEN + np.arange(20))).astype(np.int32)
        out = torch.empty_like(q)
        parts = Parts.of([Seen(0, slots, np.arange(2), np.zeros(2, np.int64), np.array((596, 590)))], 2)
        attend_quantized(q, rows, full, parts, bits, head_dim**-0.5, out)
        for token, count in enumerate((596, 590)):
            expected = attend_quantized_ref(q[token], rows, full, slots[:count], bits, head_dim**-0.5)
            if not torch.allclose(out[token].float(), expected.float(), rtol=2**-6, atol=2e-3):
                return "its result differs from the reference on this machine; please report it"
    return None


def sample(dim: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [2, 6, D], rows of 20 blocks [2, 2, 640, B], and an open block [2, 2, 32, D]: values of about 1."""
    q = torch.randn(2, 6, dim, generator=generator).bfloat16()
    full = torch.randn(2, 2, TOKENS, dim, generator=generator).bfloat16()
    if bits == 0:
        values = torch.randn(2, 2, 640, dim, generator=generator)
        return q, values.to(torch.float8_e4m3fn).view(torch.uint8), full
    codes = torch.randint(0, 256, (2, 2, 640, dim * bits // 8), generator=generator).to(torch.uint8)
    pairs = torch.rand(2, 2, 640, dim // 32, 2, generator=generator) * torch.tensor((4.0 / 2**bits, -2.0))
    return q, torch.cat((codes, pairs.bfloat16().view(torch.uint8).flatten(-2)), -1), full
