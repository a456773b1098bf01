"""Paged attention: all tokens, decoded, drafted or of a long prompt, read their KV where it lies, in C.

Changes in the loop: `build_attention` plans each step's reads as lists of slots (kernels/attention.py).
Exactness: rounding. Scores and weights are in float32, outputs within a bfloat16 rounding (2^-8 of the largest value) of exact;
what a token gets depends on the keys that it sees alone, so with `packed_linear` no draft, no batch, no chunk of a prompt and no
cache changes a bit of it.
Costs: nothing. Helps most where many sequences decode at once, whose contexts are not copied side by side first, and long prompts.
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


MOST_PARTS = 2048  # of a call: llama-1b's are 8 kB each, 17 MB


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
    """Each step's short queries in one call a layer, and long ones in pieces that keep what they hold in between small."""

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
        found: list[Parts] = []
        for kv, query in zip(kvs, queries, strict=True):
            query.spans.append([])
            if query.is_short:
                short += _seen(pool, group, kv, query)
            else:
                found += [Parts.of([some], num_tokens) for one in _seen(pool, group, kv, query) for some in _cut(one)]
        return [Parts.of(short, num_tokens), *found] if short else found

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        if not batch.reads:
            return self.core.run(q, k, v, store, layer, batch, group, None)
        out = q.new_empty(q.shape)
        for parts in batch.reads[group]:
            self.attend(q, store.data[0, layer], store.data[1, layer], parts, self.scale, out)
        return out


def _seen(pool: Pool, group: int, kv: KVState, query: Query) -> list[Seen]:
    """What a query's tokens see: all the same slots, each up to its own; of a draft tree what is stored, and then each its path."""
    import numpy as np

    from pitlane.kernels.attention import PIECE, Seen

    first, count, window = kv.num_computed_tokens, query.end - query.begin, pool.groups[group].window
    base = 0 if window is None else max(0, first - window + 1) // PIECE * PIECE
    size = pool.block_size
    table = kv.block_tables[group][base // size : -(-(first + count) // size)]
    starts = np.array(table, dtype=np.int32) * size
    if min(table) < 0:  # dropped ones, which nobody sees any more
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
    whole = first // PIECE * PIECE
    found = [Seen(base, slots[: whole - base], tokens, lows, highs)]
    for i in range(count):
        path = np.concatenate((slots[whole - base : first - base], own[tree[i]]))
        found.append(Seen(whole, path, tokens[i : i + 1], lows[i : i + 1], highs[i : i + 1]))
    return found


def _cut(seen: Seen) -> Iterator[Seen]:
    """A long query by so many tokens that they have at most `MOST_PARTS` parts."""
    from pitlane.kernels.attention import PIECE

    count = max(1, MOST_PARTS * PIECE // max(PIECE, len(seen.slots)))
    for at in range(0, len(seen.tokens), count):
        some = slice(at, at + count)
        yield seen._replace(tokens=seen.tokens[some], lows=seen.lows[some], highs=seen.highs[some])
