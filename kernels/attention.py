"""Attention over paged KV in bfloat16: softmax(scale q K^T) V over the slots that each token sees.

A token's keys are cut into pieces at multiples of 512. A piece is one softmax over its keys in order, and a token's pieces
merge by their largest scores and their sums (Milakov and Gimelshein 2018). A piece that several tokens see, even if a token
sees only a part of it, becomes one task for all of them, its members. So a shared document is read once. A token's result
depends only on its keys and their order: it is bit-equal whether the token is decoded, drafted or in a long prompt.
Per key of a task and KV head: moves 4 D bytes; computes 4 D operations per member and query head.
Source: Kwon et al. 2023 (PagedAttention); Dao et al. 2022 (FlashAttention); Juravsky et al. 2024 (Hydragen, shared pieces).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pitlane.kernels.extension import cpu, without_vectors

PIECE = 512
MAX_MEMBERS = 64  # of a task: a larger limit leaves some threads without a task
Slots: TypeAlias = npt.NDArray[np.int32]
Indices: TypeAlias = npt.NDArray[np.int64]
Members: TypeAlias = Indices | list[tuple[int, int, int, int]]


class Seen(NamedTuple):
    """A run of keys and the query tokens that see them.

    Key `first + i` lies in slot slots[i]; first is a multiple of PIECE. Query token tokens[j] sees the keys
    `[lows[j], highs[j])`. For a single token, tokens, lows and highs may be lists. Of n tokens, token n + t is the second query of
    token t; it has the result of token t in common.
    """

    first: int
    slots: Slots
    tokens: Indices | list[int]
    lows: Indices | list[int]
    highs: Indices | list[int]


class Parts(NamedTuple):
    """The work for `attend`: slots int32, tasks [n, 4], members [P, 4] and rows [R, 3] int64.

    kernels/cpu/attention_bf16.h explains the columns.
    """

    slots: Tensor
    tasks: Tensor
    members: Tensor
    rows: Tensor

    @classmethod
    def of(cls, seen: Iterable[Seen], num_tokens: int) -> Parts:
        """Cut runs of keys into tasks for query tokens `[0, num_tokens)`. The runs of a token come in the order of its keys."""
        runs = list(seen)
        if num_tokens == 1 and all(len(run.tokens) == 1 for run in runs):
            return cls._of_one_token(runs)
        num_parts = np.zeros(num_tokens, np.int64)
        pieces: dict[bytes, tuple[Slots, list[Members]]] = {}
        for run in runs:
            for at in range(0, len(run.slots), PIECE):
                piece, start = run.slots[at : at + PIECE], run.first + at
                group = _members(run, start, start + len(piece), num_parts)
                if len(group):
                    pieces.setdefault(piece.tobytes(), (piece, []))[1].append(group)
        tasks: list[tuple[int, int, int, int]] = []
        at = end = 0
        for piece, groups in pieces.values():
            begin, end = end, end + sum(map(len, groups))
            for low in range(begin, end, MAX_MEMBERS):
                tasks.append((at, len(piece), low, min(MAX_MEMBERS, end - low)))
            at += len(piece)
        (tokens,), firsts = num_parts.nonzero(), num_parts.cumsum() - num_parts
        members = np.concatenate([group for _, groups in pieces.values() for group in groups])
        members[:, 1] += firsts[members[:, 0] % num_tokens]
        rows = np.empty((len(tokens), 3), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = tokens, firsts[tokens], num_parts[tokens]
        slots = np.concatenate([piece for piece, _ in pieces.values()])
        return cls(*map(torch.from_numpy, (slots, np.array(tasks), members, rows)))

    @classmethod
    def _of_one_token(cls, runs: list[Seen]) -> Parts:
        """The same for a batch of one token: the decode step of one sequence, where numpy's calls would count."""
        tasks: list[tuple[int, int, int, int]] = []
        members: list[tuple[int, int, int, int]] = []
        offset = 0
        for run in runs:
            low, high, num_keys = int(run.lows[0]) - run.first, int(run.highs[0]) - run.first, len(run.slots)
            for at in range(0, num_keys, PIECE):
                length = min(PIECE, num_keys - at)
                if low < at + length and high > at:
                    tasks.append((offset + at, length, len(members), 1))
                    members.append((int(run.tokens[0]), len(members), max(low - at, 0), min(high - at, length)))
            offset += num_keys
        slots = runs[0].slots if len(runs) == 1 else np.concatenate([run.slots for run in runs])
        rows = [(0, 0, len(members))]
        return cls(torch.from_numpy(slots), torch.tensor(tasks), torch.tensor(members), torch.tensor(rows))


def _members(run: Seen, start: int, stop: int, num_parts: Indices) -> Members:
    """The members [m, 4] of a piece `[start, stop)`: token, index among the token's parts, and which keys it sees.

    Counts the new part of each token in num_parts. A single token is handled without numpy, whose calls would take
    longer than its attention.
    """
    if len(run.tokens) == 1:
        (token,), (low,), (high,) = run.tokens, run.lows, run.highs
        if low >= stop or high <= start:
            return []
        index = int(num_parts[token % len(num_parts)])
        num_parts[token % len(num_parts)] = index + 1
        return [(token, index, max(low - start, 0), min(high, stop) - start)]
    run_lows, run_highs = np.asarray(run.lows), np.asarray(run.highs)
    inside = (run_lows < stop) & (run_highs > start)
    tokens = np.asarray(run.tokens)[inside]
    lows, highs = np.maximum(run_lows[inside] - start, 0), np.minimum(run_highs[inside], stop) - start
    members = np.stack((tokens, num_parts[tokens % len(num_parts)], lows, highs), 1)
    num_parts[tokens % len(num_parts)] += 1
    return members


def attend_ref(q: Tensor, keys: Tensor, values: Tensor, slots: Slots, scale: float) -> Tensor:
    """The reference for one token, in float32: q [H, D], keys and values [Hkv, S, D] -> [H, D] in q's dtype."""
    index, groups = torch.from_numpy(slots).long(), q.shape[0] // keys.shape[0]
    k, v = (x[:, index].float().repeat_interleave(groups, 0) for x in (keys, values))
    weights = (scale * torch.einsum("hd,hsd->hs", q.float(), k)).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, v).to(q.dtype)


def partial_results(q: Tensor, out: Tensor, stores: Sequence[Tensor], parts: Parts) -> Tensor:
    """Check queries and outputs [T, H, D] and the stores [..., Hkv, S, width]; return memory for the results of the parts."""
    _, heads, dim = q.shape
    if q.dtype != torch.bfloat16 or out.dtype != torch.bfloat16:
        raise ValueError(f"q and out must be bfloat16, got {q.dtype}, {out.dtype}")
    kv_heads = stores[0].shape[-3]
    if out.shape[1:] != q.shape[1:] or heads % kv_heads or any(store.shape[-3] != kv_heads for store in stores):
        shapes = [list(store.shape) for store in stores]
        raise ValueError(f"shapes do not fit: q {list(q.shape)}, out {list(out.shape)}, stores {shapes}")
    if q.stride()[1:] != (dim, 1) or not out.is_contiguous():
        raise ValueError(f"rows of q and out must be contiguous, got strides {q.stride()}, {out.stride()}")
    if any(store.stride()[-2:] != (store.shape[-1], 1) for store in stores):
        raise ValueError(f"slots of a head must follow each other, got strides {[store.stride() for store in stores]}")
    return torch.empty(len(parts.members) * heads * (dim + 2))


def attend(q: Tensor, keys: Tensor, values: Tensor, parts: Parts, scale: float, out: Tensor) -> None:
    """Write the rows of out [T, H, D] that `parts` names. q [T, H, D], with any stride of tokens; keys, values [Hkv, S, D].

    If `parts` names second queries, q is [2 T, H, D].
    """
    _, heads, dim = q.shape
    kv_heads = keys.shape[0]
    if keys.dtype != torch.bfloat16 or values.dtype != torch.bfloat16:
        raise ValueError(f"keys and values must be bfloat16, got {keys.dtype}, {values.dtype}")
    if len(q) not in (len(out), 2 * len(out)) or keys.shape != values.shape or keys.shape[2] != dim:
        raise ValueError(f"shapes do not fit: q {q.shape}, keys {keys.shape}, values {values.shape}, out {out.shape}")
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values must have equal strides, got {keys.stride()}, {values.stride()}")
    partial = partial_results(q, out, (keys, values), parts)
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
    """Why `attend` cannot run on this machine; None if it can. Compares it with the reference, once per head size."""
    if (reason := without_vectors()) is not None:
        return reason
    if not cpu.has_attention_bf16(head_dim):
        return f"heads of {head_dim} are no multiple of 32 up to 256"
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((2, 6, head_dim), (2, 700, head_dim), (2, 700, head_dim))
    )
    slots = torch.randperm(700, generator=generator).numpy().astype(np.int32)
    out, counts = torch.empty_like(q), np.array((600, 700))
    seen = Seen(0, slots, np.arange(2), np.zeros(2, np.int64), counts)
    attend(q, keys, values, Parts.of([seen], 2), head_dim**-0.5, out)
    for token, count in enumerate(counts):
        expected = attend_ref(q[token], keys, values, slots[:count], head_dim**-0.5)
        if not torch.allclose(out[token].float(), expected.float(), rtol=2**-6, atol=2e-3):
            return "its result differs from the reference on this machine; please report it"
    return None
