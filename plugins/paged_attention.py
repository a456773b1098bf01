"""Paged attention: decoded tokens and drafts read their KV where it lies, in one call a layer, in C.

Changes in the loop: `build_attention` plans each step's reads as lists of slots (kernels/attention.py); prompts of more than 72
tokens stay with the core's attention.
Exactness: rounding. Scores and weights are in float32, outputs within a bfloat16 rounding (2^-8 of the largest value) of exact;
what a token gets depends on the keys that it sees alone, so with `packed_linear` no draft and no batch changes a bit of it.
Costs: nothing. Helps most where many sequences decode at once: their contexts are not copied side by side first.
Source: Kwon et al. 2023, arXiv:2309.06180; Juravsky et al. 2024, arXiv:2402.05099
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, NamedTuple

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pitlane import Attention, Batch, BuildContext, KVStore, Pool, Query, Sequence
    from pitlane.kernels.attention import Parts, Seen, Slots


class PagedAttention(Plugin):
    name, role, exactness = "paged_attention", "attention", "rounding"

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import attention
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or attention.unavailable(context.config.head_dim)

    @hookimpl
    def build_attention(self, context: BuildContext) -> Attention:
        return Paged(context.config.attention_scale, context.device)


class Reads(NamedTuple):
    """Of one step and KV group. parts: of short queries; core: what the core's attention planned for long ones."""

    parts: Parts | None
    core: Any


class Paged:
    """Short queries by the kernel, long ones by the core's attention."""

    def __init__(self, scale: float, device: torch.device) -> None:
        from pitlane import SpanAttention
        from pitlane.kernels.attention import attend

        self.attend = attend
        self.scale = scale
        self.core = SpanAttention(scale, device)

    def plan(
        self, pool: Pool, group: int, seqs: SequenceOf[Sequence], queries: list[Query], dtype: torch.dtype
    ) -> Reads:
        from pitlane.kernels.attention import Parts

        pairs = list(zip(seqs, queries, strict=True))
        seen = [one for seq, query in pairs if query.is_short for one in _seen(pool, group, seq, query)]
        long = [(seq, query) for seq, query in pairs if not query.is_short]
        for query in queries:
            if query.is_short:
                query.spans.append([])
        core = self.core.plan(pool, group, [s for s, _ in long], [q for _, q in long], dtype) if long else None
        return Reads(Parts.of(seen) if seen else None, core)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, batch: Batch, group: int) -> Tensor:
        parts, core = batch.reads[group] if batch.reads else (None, None)
        out = (
            q.new_empty(q.shape) if core is None and parts else self.core.run(q, k, v, store, layer, batch, group, core)
        )
        if parts:
            self.attend(q, store.data[0, layer], store.data[1, layer], parts, self.scale, out)
        return out


def _seen(pool: Pool, group: int, seq: Sequence, query: Query) -> list[Seen]:
    """The slots that a short query's tokens see: what is stored before them, and their paths among themselves."""
    import numpy as np

    from pitlane.kernels.attention import Seen

    first, count, window = seq.num_computed_tokens, query.end - query.begin, pool.groups[group].window
    low = 0 if window is None else max(0, first - window + 1)
    size = pool.block_size
    blocks = np.asarray(seq.block_tables[group][low // size : -(-(first + count) // size)], dtype=np.int32)
    slots: Slots = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).astype(np.int32).ravel()[low % size :]
    stored, own = slots[: first - low], slots[first - low : first - low + count]
    tree = None if query.ancestors is None else query.ancestors.numpy()
    paths = [own[: i + 1] if tree is None else own[tree[i]] for i in range(count)]
    tokens = range(query.begin, query.end)
    if window is None:
        return [Seen(0, stored, list(zip(tokens, paths, strict=True)))]
    alone = []
    for token, path in zip(tokens, paths, strict=True):
        start = max(low, first + len(path) - window)  # the first index that this token sees
        rest = max(0, start - first)  # more than all that is stored is out of sight
        alone.append(Seen(start, stored[min(start, first) - low :], [(token, path[rest:])]))
    return alone
