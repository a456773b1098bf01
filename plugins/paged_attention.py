"""Paged attention: attention in C over paged KV, without a copy, for decode, drafts and prefill.

Changes in the loop: `build_attention` plans the reads of each step as lists of slots (kernels/attention.py).
Exactness: rounding. Scores and softmax weights are in float32: an output is within 2^-8 (relative) of the exact value, plus 1e-5
for values of about 1. A token's result depends only on the keys that it sees and on their order. So with `packed_linear` its bits
are the same in any draft, batch or chunk of a prompt, and after a cache hit.
Costs: nothing. Helps most with long prompts, and when many sequences decode at once, whose contexts the core copies side by side.
Source: Kwon et al. 2023, arXiv:2309.06180; Dao et al. 2022, arXiv:2205.14135; Juravsky et al. 2024, arXiv:2402.05099
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pitlane import Attention, Batch, BuildContext, KVState, KVStore, Pool, Query
    from pitlane.kernels.attention import Parts, Seen, Slots


MAX_PARTS = 2048  # per call, to bound its partial results: 17 MB for llama-1b, 8 kB a part


class PagedAttention(Plugin):
    name, role, exactness = "paged_attention", "attention", "rounding"
    is_default = batch_invariant = True

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import attention
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or attention.unavailable(context.config.head_dim)

    @hookimpl
    def build_attention(self, context: BuildContext) -> Attention:
        return Paged(context.config.attention_scale, context.device)


class Paged:
    """One kernel call per layer for all short queries of a step; calls of at most `MAX_PARTS` parts for each long query."""

    def __init__(self, scale: float, device: torch.device) -> None:
        from pitlane import SpanAttention
        from pitlane.kernels.attention import attend

        self.attend = attend
        self.scale = scale
        self.core = SpanAttention(scale, device)

    def plan(
        self, pool: Pool, group: int, kvs: SequenceOf[KVState], queries: list[Query], dtype: torch.dtype
    ) -> list[Parts]:
        from pitlane.kernels.attention import Parts

        num_tokens = queries[-1].end
        short: list[Seen] = []
        calls: list[Parts] = []
        for kv, query in zip(kvs, queries, strict=True):
            query.spans.append([])
            if query.is_short:
                short += _seen(pool, group, kv, query)
            else:
                for seen in _seen(pool, group, kv, query):
                    calls += [Parts.of([piece], num_tokens) for piece in _cut(seen)]
        return [Parts.of(short, num_tokens), *calls] if short else calls

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        if not batch.reads:
            return self.core.run(q, k, v, store, layer, batch, group, None)
        out = q.new_empty(q.shape)
        for parts in batch.reads[group]:
            self.attend(q, store.data[0, layer], store.data[1, layer], parts, self.scale, out)
        return out


def _seen(pool: Pool, group: int, kv: KVState, query: Query) -> list[Seen]:
    """The slots that the tokens of a query see.

    A chain is one `Seen`: all tokens share its slots, and a token sees the keys up to its own. In a draft tree the tokens share the
    whole pieces before the draft; every token has a second `Seen` with the rest of the context and its own path.
    """
    import numpy as np

    from pitlane.kernels.attention import PIECE, Seen

    first, count, window = kv.num_computed_tokens, query.end - query.begin, pool.groups[group].window
    base = 0 if window is None else max(0, first - window + 1) // PIECE * PIECE
    size = pool.block_size
    table = kv.block_tables[group][base // size : -(-(first + count) // size)]
    starts = np.array(table, dtype=np.int32) * size
    if min(table) < 0:  # dropped blocks lie outside of the window: any valid slot may stand in for theirs
        starts[starts < 0] = starts[-1]
    slots: Slots = np.add.outer(starts, np.arange(size, dtype=np.int32)).ravel()[: first + count - base]
    if count == 1:
        return [Seen(base, slots, [query.begin], [max(0, first + 1 - window) if window else 0], [first + 1])]
    own = slots[first - base :]
    tokens = np.arange(query.begin, query.end)
    tree = None if query.ancestors is None else query.ancestors.numpy()
    highs = first + (np.arange(1, count + 1) if tree is None else tree.sum(1))
    lows = np.maximum(0, highs - window) if window is not None else np.zeros_like(highs)
    if tree is None:
        return [Seen(base, slots, tokens, lows, highs)]
    common = first // PIECE * PIECE
    seen = [Seen(base, slots[: common - base], tokens, lows, highs)]
    for i in range(count):
        path = np.concatenate((slots[common - base : first - base], own[tree[i]]))
        seen.append(Seen(common, path, tokens[i : i + 1], lows[i : i + 1], highs[i : i + 1]))
    return seen


def _cut(seen: Seen) -> Iterator[Seen]:
    """Cut a long query into pieces of its tokens that have at most `MAX_PARTS` parts."""
    from pitlane.kernels.attention import PIECE

    count = max(1, MAX_PARTS * PIECE // max(PIECE, len(seen.slots)))
    for begin in range(0, len(seen.tokens), count):
        piece = slice(begin, begin + count)
        yield seen._replace(tokens=seen.tokens[piece], lows=seen.lows[piece], highs=seen.highs[piece])
