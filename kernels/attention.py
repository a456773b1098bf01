"""Attention of single tokens over paged KV, in bfloat16: softmax(scale q K^T) V over the slots that each token sees.

A token's keys are cut where their index is a multiple of 512; each piece is one softmax over slots in their order, and pieces
merge by their largest score and sum (Milakov and Gimelshein 2018). A piece that several tokens see whole is one task for all of
them, so a shared document is read once. What a token gets depends on its keys and their order alone: a draft token's is equal to
the bit to what it would get as the last known token. Bytes moved: 4 D for every key of a task and KV head, operations 4 D for each
of its members and query heads.
Source: Kwon et al. 2023 (PagedAttention); Juravsky et al. 2024 (Hydragen) for shared pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pitlane.kernels.extension import MISSING, cpu

PIECE = 512
Slots: TypeAlias = npt.NDArray[np.int32]


class Seen(NamedTuple):
    """Slots that some query tokens see: all of them `stored`, the tokens from index `first` on, then each its own path."""

    first: int
    stored: Slots
    paths: Sequence[tuple[int, Slots]]  # query token and the slots behind `stored`, at least one of both


class Parts(NamedTuple):
    """What `attend` works on, by kernels/cpu/attention_bf16.h: slots int32; tasks [n, 4], members [P, 2], rows [R, 3] int64."""

    slots: Tensor
    tasks: Tensor
    members: Tensor
    rows: Tensor

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Parts:
        pieces: dict[bytes, tuple[Slots, list[tuple[int, int]]]] = {}
        rows: list[tuple[int, int, int]] = []
        num_parts = 0
        for first, stored, paths in seen:
            whole = max(0, (first + len(stored)) // PIECE * PIECE - first)
            common = _pieces(first, stored[:whole])
            for token, path in paths:
                own = _pieces(first + whole, np.concatenate([stored[whole:], path]))
                for part, piece in enumerate([*common, *own], num_parts):
                    pieces.setdefault(piece.tobytes(), (piece, []))[1].append((token, part))
                rows.append((token, num_parts, len(common) + len(own)))
                num_parts += rows[-1][2]
        tasks: list[tuple[int, int, int, int]] = []
        at = members = 0
        for piece, sharing in pieces.values():
            tasks.append((at, len(piece), members, len(sharing)))
            at, members = at + len(piece), members + len(sharing)
        return cls(
            torch.from_numpy(np.concatenate([piece for piece, _ in pieces.values()])),
            torch.tensor(tasks),
            torch.tensor([member for _, sharing in pieces.values() for member in sharing]),
            torch.tensor(rows),
        )


def _pieces(first: int, slots: Slots) -> list[Slots]:
    cuts = range(-first % PIECE, len(slots), PIECE)
    return [piece for piece in np.split(slots, list(cuts)) if len(piece)]


def attend_ref(q: Tensor, keys: Tensor, values: Tensor, slots: Slots, scale: float) -> Tensor:
    """One token in float32: q [H, D], keys and values [Hkv, S, D] -> [H, D] in q's dtype."""
    index, groups = torch.from_numpy(slots).long(), q.shape[0] // keys.shape[0]
    k, v = (x[:, index].float().repeat_interleave(groups, 0) for x in (keys, values))
    weights = (scale * torch.einsum("hd,hsd->hs", q.float(), k)).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, v).to(q.dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, parts: Parts, scale: float, out: Tensor) -> None:
    """Write the rows of out [T, H, D] that `parts` names. q [T, H, D], its tokens may be strided; keys, values [Hkv, S, D]."""
    num_tokens, heads, dim = q.shape
    kv_heads, num_slots, _ = keys.shape
    assert q.stride()[1:] == (dim, 1) and out.is_contiguous(), f"strides {q.stride()}, {out.stride()}"
    assert keys.stride() == values.stride() and keys.stride()[1:] == (dim, 1), f"strides {keys.stride()}"
    partial = torch.empty(len(parts.members) * heads * (dim + 2))
    cpu.attention_bf16(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        partial.data_ptr(),
        parts.slots.data_ptr(),
        parts.tasks.data_ptr(),
        parts.members.data_ptr(),
        parts.rows.data_ptr(),
        len(parts.tasks),
        len(parts.rows),
        heads,
        kv_heads,
        dim,
        q.stride(0),
        keys.stride(0),
        torch.get_num_threads(),
        scale,
    )


@cache
def unavailable(head_dim: int) -> str | None:
    """Why `attend` cannot be used on this machine; None if it can. Checked against the reference, once per head size."""
    if cpu is None:
        return MISSING
    if not cpu.has_attention_bf16(head_dim):
        return f"this CPU has no AVX-512 BF16, or heads of {head_dim} are not among 32, 64, 96, 128 and 256"
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((2, 6, head_dim), (2, 700, head_dim), (2, 700, head_dim))
    )
    slots = torch.randperm(700, generator=generator).numpy().astype(np.int32)
    out = torch.empty_like(q)
    attend(q, keys, values, Parts.of([Seen(0, slots[:600], [(0, slots[:0]), (1, slots[600:])])]), head_dim**-0.5, out)
    for token, count in enumerate((600, 700)):
        expected = attend_ref(q[token], keys, values, slots[:count], head_dim**-0.5)
        if not torch.allclose(out[token].float(), expected.float(), rtol=2**-6, atol=2e-3):
            return "its result differs from the reference on this machine; please report it"
    return None
