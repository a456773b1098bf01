"""RoPE and the KV write in one pass: rotates queries and keys, and writes keys and values to the slots of a dense store.

A program takes a token and a block of heads. Dimension i < D / 2 turns with dimension i + D / 2:
y = x * cos + roll(x, D / 2) * sin, where the first half of sin is negated. Computed in float32, rounded once. Moves
2 T (H + 2 Hkv) D elements. Shapes: qk [T, H + Hkv, D], v [T, Hkv, D], cos and sin [T, 1, D], keys and values [Hkv, S, D].
Reference: `rope_store_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitlane.kernels.cuda.device import power_of_two

HEADS = 8  # of a program


def rope_store_ref(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """The reference in float32."""
    x = qk.float()
    rotated = (x * cos.float() + torch.roll(x, x.shape[-1] // 2, -1) * sin.float()).to(qk.dtype)
    keys.index_copy_(1, slots, rotated[:, qk.shape[1] - keys.shape[0] :].transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return rotated


@triton.jit
def rope_store_kernel(
    qk, v, cos, sin, keys, values, slots, out, qk_stride, v_stride, head_stride, slot_stride,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """QUERIES: heads of queries. HEADS: heads of queries and keys; the heads of values follow them."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    inside = (columns < DIM)[None, :]
    turned = (head < HEADS)[:, None] & inside
    other = (columns + DIM // 2) % DIM
    x = tl.load(qk + token * qk_stride + head[:, None] * DIM + columns[None, :], turned, 0.0).to(tl.float32)
    partner = tl.load(qk + token * qk_stride + head[:, None] * DIM + other[None, :], turned, 0.0).to(tl.float32)
    c = tl.load(cos + token * DIM + columns, columns < DIM, 0.0).to(tl.float32)
    s = tl.load(sin + token * DIM + columns, columns < DIM, 0.0).to(tl.float32)
    y = (x * c[None, :] + partner * s[None, :]).to(out.dtype.element_ty)
    tl.store(out + (token * HEADS + head[:, None]) * DIM + columns[None, :], y, turned)
    slot = tl.load(slots + token) * slot_stride
    key_head = (head - QUERIES).to(tl.int64)
    at = key_head[:, None] * head_stride + slot + columns[None, :]
    tl.store(keys + at, y, turned & (head >= QUERIES)[:, None])
    value_head = (head - HEADS).to(tl.int64)
    held = ((head >= HEADS) & (head < 2 * HEADS - QUERIES))[:, None] & inside
    value = tl.load(v + token * v_stride + value_head[:, None] * DIM + columns[None, :], held, 0.0)
    tl.store(values + value_head[:, None] * head_stride + slot + columns[None, :], value, held)


def rope_store(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Return qk rotated, a new tensor, and write the rotated keys and v to the slots [T]. Tokens of qk and v may be strided."""
    tokens, heads, dim = qk.shape
    kv_heads = keys.shape[0]
    if v.shape != (tokens, kv_heads, dim) or keys.shape != values.shape or keys.shape[2] != dim or heads <= kv_heads:
        raise ValueError(f"shapes do not fit: qk {qk.shape}, v {v.shape}, keys {keys.shape}, values {values.shape}")
    if cos.numel() != tokens * dim or sin.numel() != tokens * dim or slots.shape != (tokens,):
        raise ValueError(f"cos, sin and slots must be of {tokens} tokens, got {cos.shape}, {sin.shape}, {slots.shape}")
    if qk.stride()[1:] != (dim, 1) or v.stride()[1:] != (dim, 1) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"heads must be contiguous, got strides {qk.stride()}, {v.stride()}, {cos.stride()}")
    if keys.stride() != values.stride() or keys.stride(2) != 1:
        raise ValueError(f"keys and values must be stored alike, got strides {keys.stride()}, {values.stride()}")
    out = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    if tokens:
        width = power_of_two(dim)
        grid = tokens, triton.cdiv(heads + kv_heads, HEADS)
        rope_store_kernel[grid](
            qk, v, cos, sin, keys, values, slots, out, qk.stride(0), v.stride(0), keys.stride(0), keys.stride(1),
            heads - kv_heads, heads, dim, width, HEADS, num_warps=4,
        )  # fmt: skip
    return out
