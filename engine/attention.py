"""Attention of a batch over stored KV, in parts that are merged by log-sum-exp.

Each sequence's queries see: the spans before them (everything in them, but for a window), and themselves (causal, or the
draft tree's ancestors). Every part is one softmax; parts merge exactly by their log-sum-exps (Dao et al. 2022, section 3.1).
What several sequences share is one part for all of them, and short contexts of single queries are gathered into one call.
The G query heads of a KV head are folded into rows where no mask is needed, so a draft window reads stored KV once.
Shapes: q [T, H, D]; stored KV [Hkv, S, D]; H = Hkv * G.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pitlane.engine.batch import Batch, Gather, Query, Reads, Span
from pitlane.engine.kv_store import KVStore


class Attention(Protocol):
    """What `build_attention` returns and a model calls once per layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        """q [T, H, D], fresh k and v [T, Hkv, D] (already in the store) -> [T, H, D]."""


class SpanAttention:
    """The core's attention: ATen's CPU flash op, or plain softmax where there is none."""

    def __init__(self, scale: float, device: torch.device) -> None:
        self.scale = scale
        self.attend = _attend_flash_cpu if device.type == "cpu" else _attend_plain

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        reads = batch.reads[group] if batch.reads else Reads()
        if len(reads.gathers) == 1 and reads.gathers[0].rows is None and not reads.shared:
            return self._gathered(q, store, layer, reads.gathers[0])[0]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for gather in reads.gathers:
            rows = slice(None) if gather.rows is None else gather.rows
            out[rows], lse[rows] = self._gathered(q[rows], store, layer, gather)
        for query in batch.queries:
            if query.end - query.begin > 1 or query.own[group]:
                own = slice(query.begin, query.end)
                out[own], lse[own] = self._alone(q[own], k[own], v[own], store, layer, batch, query, group)
        for shared in reads.shared:  # outer ones first, and each behind what its rows see alone
            part = self._over_span(q[shared.rows], *store.view(layer, shared.span.start, shared.span.stop), None)
            out[shared.rows], lse[shared.rows] = _merge([(out[shared.rows], lse[shared.rows]), part])
        return out

    def _alone(
        self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, query: Query, group: int
    ) -> tuple[Tensor, Tensor]:
        """One sequence's queries over the spans that it alone reads, and over themselves."""
        window = store.group.window
        positions = batch.positions[query.begin : query.end] if window is not None else None
        n = len(q)
        parts = []
        for span in query.own[group] if n == 1 else query.spans[group]:
            mask = None if positions is None else _window_mask(positions, span, window)
            parts.append(self._over_span(q, *store.view(layer, span.start, span.stop), mask))
        if n > 1:
            mask = _own_mask(query.ancestors, positions, window)
            parts.append(self._unfolded(q, k.transpose(0, 1), v.transpose(0, 1), mask, mask is None))
        return _merge(parts)

    def _gathered(self, q: Tensor, store: KVStore, layer: int, gather: Gather) -> tuple[Tensor, Tensor]:
        """Queries [B, H, D], one of each sequence, over B contexts copied side by side -> out [B, H, D], lse [B, H]."""
        n, heads, dim = q.shape
        keys, values = store.gather(layer, gather.slots, n)
        out, lse = self.attend(q.view(n, keys.shape[1], -1, dim), keys, values, gather.bias, False, self.scale)
        return out.reshape(n, heads, dim), lse.reshape(n, heads)

    def _over_span(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries [n, H, D] over stored tokens [Hkv, S, D] -> out [n, H, D], log-sum-exp [n, H]."""
        if mask is not None:
            return self._unfolded(q, k, v, mask, False)
        n, heads, dim = q.shape
        kv_heads = k.shape[0]
        if n == 1:
            out, lse = self.attend(q.view(1, kv_heads, -1, dim), k[None], v[None], None, False, self.scale)
            return out.reshape(1, heads, dim), lse.reshape(1, heads)
        folded = q.view(n, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        out, lse = self.attend(folded, k[None], v[None], None, False, self.scale)
        out = out.view(kv_heads, -1, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)
        return out, lse.view(kv_heads, -1, n).permute(2, 0, 1).reshape(n, heads)

    def _unfolded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        """As `_over_span` with a mask [n, S]: KV heads are the batch, keys are repeated by stride, not by copy."""
        n, heads, dim = q.shape
        bias = None if mask is None else _bias(mask, q)
        groups = heads // k.shape[0]
        q4 = q.view(n, -1, groups, dim).permute(1, 2, 0, 3)
        k4, v4 = (x[:, None].expand(-1, groups, -1, -1) for x in (k, v))
        out, lse = self.attend(q4, k4, v4, bias, causal, self.scale)
        if mask is not None:  # of a row that sees nothing here ATen gives out 0 and lse 0; it must weigh nothing
            lse = lse.masked_fill(~mask.any(-1), float("-inf"))
        return out.permute(2, 0, 1, 3).reshape(n, heads, dim), lse.permute(2, 0, 1).reshape(n, heads)


def _window_mask(positions: Tensor, span: Span, window: int | None) -> Tensor | None:
    """[n, S] bool where some query's window begins inside the span; None where all of it is seen by all."""
    if window is None or int(positions.max()) - window < span.first:
        return None
    stored = torch.arange(span.first, span.first + span.stop - span.start, device=positions.device)
    return positions[:, None] - stored < window


def _own_mask(ancestors: Tensor | None, positions: Tensor | None, window: int | None) -> Tensor | None:
    """[n, n] bool of the queries among themselves; None for plain causal."""
    if positions is None or window is None or len(positions) <= window:
        return ancestors
    distance = positions[:, None] - positions
    return (distance < window) & ((distance >= 0) if ancestors is None else ancestors)


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, D] and log-sum-exps [n, H] over disjoint sets of keys -> the same over their union."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().unsqueeze(-1)  # float32, or the model's if wider
    out = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = torch.addcmul(out, part.to(out.dtype), weight)
    return out.to(parts[0][0].dtype), lse


def _attend_flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).float() * scale if q.dtype.itemsize < 8 else q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        n = q.shape[-2]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    shift = lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)  # finite, so that a row that sees nothing is 0
    return (scores - shift).exp().to(v.dtype) @ v, lse
