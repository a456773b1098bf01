"""Attention of a batch over stored KV, in parts that are merged by log-sum-exp.

A part is one softmax over some of the keys of a query. Parts merge exactly by their log-sum-exps (Dao et al. 2022, section 3.1).
A token with a draft behind it is cut into the same parts as a token without a draft, and ATen sums a part in the same order. So in
bfloat16 98 or 99 of 100 outputs are equal to the bit; without this rule only 2 of 3 are equal.
KV that several sequences share is one part for all of them. Short contexts of single queries are gathered into one call.
The G query heads of a KV head are folded into rows, so a draft reads stored KV once. The own part of a long prompt is not folded.
Shapes: q [T, H, D]; stored KV [Hkv, S, D]; H = Hkv * G.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pitlane.plugins.span_attention.reads import Alone, Gather, Mask, Planner, Reads

if TYPE_CHECKING:
    from pitlane import Batch, BuildContext, KVStore


class SpanAttention:
    """ATen's flash operation on a CPU, a plain softmax on other devices."""

    formats = None
    reads_sinks = True

    def __init__(self, context: BuildContext) -> None:
        config = context.config
        self.scale = config.attention_scale
        self.attend = _attend_flash_cpu if context.device.type == "cpu" else _attend_plain
        token_bytes = 2 * config.num_kv_heads * config.head_dim * context.dtype.itemsize
        self.planner = Planner(token_bytes, config.num_heads // config.num_kv_heads, context.dtype, context.device)

    def prepare(self, batch: Batch, group: int) -> Reads:
        return self.planner.plan(batch, group)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, reads: Reads, sink_q: Tensor | None = None
    ) -> Tensor:
        if len(reads.gathers) == 1 and reads.gathers[0].rows is None and not reads.shared and sink_q is None:
            return self._gathered(q, store, layer, reads.gathers[0])[0]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for gather in reads.gathers:
            rows = slice(None) if gather.rows is None else gather.rows
            out[rows], lse[rows] = self._gathered(q[rows], store, layer, gather)
        for query in reads.alone:
            if query.parts or not query.is_short:
                own = slice(query.begin, query.end)
                out[own], lse[own] = self._alone(q[own], k[own], v[own], store, layer, query)
        for shared in reads.shared:  # outer runs first; every run is merged into the earlier parts
            part = self._over_span(q[shared.rows], *store.view(layer, shared.span.start, shared.span.stop), None)
            out[shared.rows], lse[shared.rows] = _merge([(out[shared.rows], lse[shared.rows]), part])
        if sink_q is not None:
            self._add_sinks(out, lse, sink_q, store, layer, reads)
        return out

    def _add_sinks(self, out: Tensor, lse: Tensor, q: Tensor, store: KVStore, layer: int, reads: Reads) -> None:
        """Merge the attention of the second queries [T, H, D] to the sinks into `out` and `lse`."""
        for gather in reads.sink_gathers:
            rows = slice(None) if gather.rows is None else gather.rows
            part = self._gathered(q[rows], store, layer, gather)
            out[rows], lse[rows] = _merge([(out[rows], lse[rows]), part])
        for query in reads.sinks:
            own = slice(query.begin, query.end)
            parts = [self._over_span(q[own], *store.view(layer, at.start, at.stop), mask) for at, mask in query.parts]
            out[own], lse[own] = _merge([(out[own], lse[own]), *parts])

    def _alone(
        self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, query: Alone
    ) -> tuple[Tensor, Tensor]:
        """Attend the queries of a sequence to its spans. A long query also attends to its own tokens."""
        parts = [self._over_span(q, *store.view(layer, span.start, span.stop), mask) for span, mask in query.parts]
        if not query.is_short:
            parts.append(self._unfolded(q, k.transpose(0, 1), v.transpose(0, 1), query.own, query.own is None))
        return _merge(parts)

    def _gathered(self, q: Tensor, store: KVStore, layer: int, gather: Gather) -> tuple[Tensor, Tensor]:
        """Queries [B, H, D], one of each sequence, over B contexts copied side by side -> out [B, H, D], lse [B, H]."""
        n, heads, dim = q.shape
        keys, values = store.gather(layer, gather.slots, n)
        out, lse = self.attend(q.view(n, keys.shape[1], -1, dim), keys, values, gather.bias, False, self.scale)
        return out.reshape(n, heads, dim), lse.reshape(n, heads)

    def _over_span(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """Queries [n, H, D] over stored tokens [Hkv, S, D] -> out [n, H, D], log-sum-exp [n, H]."""
        n, heads, dim = q.shape
        kv_heads = k.shape[0]
        if mask is not None and not mask.is_folded:
            return self._unfolded(q, k, v, mask, False)
        if n == 1:
            out, lse = self.attend(q.view(1, kv_heads, -1, dim), k[None], v[None], None, False, self.scale)
            return out.reshape(1, heads, dim), lse.reshape(1, heads)
        folded = q.view(n, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        out, lse = self.attend(folded, k[None], v[None], None if mask is None else mask.bias, False, self.scale)
        out = out.view(kv_heads, -1, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)
        lse = lse.view(kv_heads, -1, n).permute(2, 0, 1).reshape(n, heads)
        return out, lse if mask is None else mask.hide(lse)

    def _unfolded(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> tuple[Tensor, Tensor]:
        """Like `_over_span`, for many queries: the KV heads are the batch, and `expand` repeats keys and values without a copy."""
        n, heads, dim = q.shape
        groups = heads // k.shape[0]
        q4 = q.view(n, -1, groups, dim).permute(1, 2, 0, 3)
        k4, v4 = (x[:, None].expand(-1, groups, -1, -1) for x in (k, v))
        out, lse = self.attend(q4, k4, v4, None if mask is None else mask.bias, causal, self.scale)
        lse = lse.permute(2, 0, 1).reshape(n, heads)
        return out.permute(2, 0, 1, 3).reshape(n, heads, dim), lse if mask is None else mask.hide(lse)


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
    shift = lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)  # finite: a row that sees no token gets output 0
    return (scores - shift).exp().to(v.dtype) @ v, lse
