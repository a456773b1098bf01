"""Flash attention: tiles with an online softmax over paged KV, read where it lies, for decode, drafts and prefill.

Changes in the loop: `build_attention` plans the reads of each step as lists of slots, for kernels in C (kernels/attention.py). On
CUDA, a kernel in Triton reads the block tables (kernels/cuda/attention.py); no GPU has run it yet.
Exactness: rounding. Scores and softmax weights are float32. An output differs from the exact value by at most 2^-8 (relative), plus
1e-5 for values of about 1. On a CPU, a token's result depends only on the visible keys and their order. So with `packed_linear`,
the result has the same bits in any draft, batch or chunk of a prompt, and after a cache hit.
Costs: nothing. Helps most with long prompts, and when many sequences decode at once: without it, the core copies their contexts.
Source: Kwon et al. 2023, arXiv:2309.06180; Dao et al. 2022, arXiv:2205.14135; Juravsky et al. 2024, arXiv:2402.05099
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import Attention, Batch, BuildContext, KVStore, PluginOptions
    from pitlane.kernels.attention import Indices, Parts, Seen, Slots
    from pitlane.kernels.cuda.attention_reads import Reads


MAX_SHORT_PARTS = 4 * 2048  # of the short queries of a kernel call
MAX_PARTS = 2048  # per kernel call; bounds the memory of partial results: 8 kB per part, 17 MB for llama-1b
MAX_SHORT_TOKENS = 72  # most tokens of a short query: room for a token with a draft of 64


class FlashAttention(Plugin):
    name, role, exactness = "flash_attention", "attention", "rounding"
    former_names = ("paged_attention",)
    is_default = batch_invariant = True

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import attention
        from pitlane.kernels.cuda import device
        from pitlane.kernels.extension import unsupported

        if device.serves(context.device):
            return device.unsupported(context.dtype, context.device)
        return unsupported(context.dtype, context.device) or attention.unavailable(context.config.head_dim)

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        from pitlane.kernels.extension import key_by_level

        return key_by_level(super().key_of(options))

    @hookimpl
    def build_attention(self, context: BuildContext) -> Attention:
        from pitlane.kernels.cuda import device

        return PagedOnCuda(context) if device.serves(context.device) else Paged(context)


class Paged:
    """Per layer: a kernel call for all short queries and draft trees, and calls of at most `MAX_PARTS` parts per long query."""

    reads_sinks = True

    def __init__(self, context: BuildContext) -> None:
        import torch

        from pitlane.kernels.attention import attend
        from pitlane.kernels.attention_quant import BITS, attend_quantized, unavailable

        self.attend, self.attend_quantized, self.bits, self.join = attend, attend_quantized, BITS, torch.cat
        self.formats = ("dense", *(() if unavailable(context.config.head_dim) else BITS))
        self.scale = context.config.attention_scale

    def prepare(self, batch: Batch, group: int) -> list[Parts]:
        from pitlane.kernels.attention import PIECE, Parts

        num_parts = 0
        num_tokens, step = batch.num_tokens, Step.of(batch, group)
        short: list[Seen] = []
        calls: list[Parts] = []
        for row, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
            sinks, runs = step.sinks(row, begin, end), step.seen(row, begin, end)
            if end - begin <= MAX_SHORT_TOKENS or len(runs) > 1:  # a kernel call merges all parts of a token
                short += [*sinks, *runs]
                num_parts += sum(len(run.tokens) * -(-len(run.slots) // PIECE) for run in (*sinks, *runs))
                if num_parts > MAX_SHORT_PARTS:
                    calls.append(Parts.of(short, num_tokens))
                    short, num_parts = [], 0
            else:
                calls += [Parts.of(pieces, num_tokens) for pieces in _cut([*sinks, *runs])]
        return [Parts.of(short, num_tokens), *calls] if short else calls

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: KVStore,
        layer: int,
        reads: list[Parts],
        sink_q: Tensor | None = None,
    ) -> Tensor:
        out, (keys, values) = q.new_empty(q.shape), store.tensors(layer)
        if sink_q is not None:  # the kernel finds the second query of token t at index T + t
            q = self.join((q, sink_q))
        bits = self.bits.get(store.format)
        for parts in reads:
            if bits is None:
                self.attend(q, keys, values, parts, self.scale, out)
            else:  # quantized KV: the rows of all blocks, and the open blocks in full precision
                self.attend_quantized(q, keys, values, parts, bits, self.scale, out)
        return out


class PagedOnCuda:
    """Per layer: a Triton kernel for all tokens, which reads the block tables."""

    reads_sinks = True

    def __init__(self, context: BuildContext) -> None:
        from pitlane.kernels.attention_quant import BITS
        from pitlane.kernels.cuda.attention import attend
        from pitlane.kernels.cuda.attention_reads import reads_of

        config = context.config
        self.attend, self.reads_of, self.bits = attend, reads_of, BITS
        self.formats = ("dense", *(() if config.head_dim % 32 else BITS))
        self.scale, self.device = config.attention_scale, context.device
        self.heads, self.dim = (config.num_heads, config.num_kv_heads), config.head_dim

    def prepare(self, batch: Batch, group: int) -> Reads:
        return self.reads_of(batch, group, self.heads, self.dim, self.device)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: KVStore,
        layer: int,
        reads: Reads,
        sink_q: Tensor | None = None,
    ) -> Tensor:
        bits = self.bits.get(store.format)
        if bits is None:
            keys, values = store.tensors(layer)
            return self.attend(q, keys, values, reads, self.scale, sink_q)
        rows, (keys, values) = store.tensors(layer)  # quantized KV: the rows of all blocks, and the open blocks
        return self.attend(q, keys, values, reads, self.scale, sink_q, rows, bits)


class Step(NamedTuple):
    """A batch as seen by one KV group. positions, parents, lows: [T]; block_table: [B, W]."""

    positions: Indices
    parents: Indices
    lows: Indices
    block_table: Slots
    block_size: int
    num_sinks: int

    @classmethod
    def of(cls, batch: Batch, group: int) -> Step:
        part = batch.groups[group]
        return cls(
            batch.positions.numpy(),
            batch.parents.numpy(),
            part.window_start.numpy(),
            part.block_table.numpy(),
            batch.block_size,
            part.num_sinks,
        )

    def sinks(self, row: int, begin: int, end: int) -> list[Seen]:
        """The slots of the sinks that the second queries of the tokens `[begin, end)` see. The query of token t has index T + t."""
        if not self.num_sinks:
            return []
        import numpy as np

        from pitlane.kernels.attention import Seen

        highs = np.minimum(self.lows[begin:end], self.num_sinks)
        stop, size = int(highs.max()), self.block_size
        if not stop:
            return []
        blocks = self.block_table[row, : -(-stop // size)] * size
        slots = np.add.outer(blocks, np.arange(size, dtype=np.int32)).ravel()[:stop]
        return [Seen(0, slots, np.arange(begin, end) + len(self.positions), np.zeros_like(highs), highs)]

    def seen(self, row: int, begin: int, end: int) -> list[Seen]:
        """The slots that are visible to the tokens `[begin, end)` of sequence `row`.

        A chain gives a single `Seen`: all tokens share its slots, and a token attends to the keys up to its own key. In a draft
        tree, the tokens share a `Seen` for the whole pieces before the draft. Every token has a further `Seen`: the rest of the
        context and its path in the tree.
        """
        import numpy as np

        from pitlane.kernels.attention import PIECE, Seen

        first, low, size, count = int(self.positions[begin]), int(self.lows[begin]), self.block_size, end - begin
        base = low // PIECE * PIECE
        starts = self.block_table[row, base // size : -(-(first + count) // size)] * size
        if starts.min() < 0:  # dropped blocks lie outside of the window and are masked: any valid slot may replace them
            starts = np.where(starts < 0, starts[-1], starts)
        slots = np.add.outer(starts, np.arange(size, dtype=np.int32)).ravel()[: first + count - base]
        if count == 1:
            return [Seen(base, slots, [begin], [low], [first + 1])]
        tokens, parents = np.arange(begin, end), self.parents[begin:end]
        lows, highs = self.lows[begin:end], self.positions[begin:end] + 1
        if not ((parents >= 0) & (parents != tokens - 1)).any():
            return [Seen(base, slots, tokens, lows, highs)]
        common = first // PIECE * PIECE
        seen = [Seen(base, slots[: common - base], tokens, lows, highs)]
        rest, own = slots[common - base : first - base], slots[first - base :]
        paths: list[list[int]] = []
        for i, parent in enumerate(parents.tolist()):
            paths.append([*(paths[parent - begin] if parent >= 0 else range(i)), i])
            path = np.concatenate((rest, own[paths[i]]))
            seen.append(Seen(common, path, tokens[i : i + 1], lows[i : i + 1], highs[i : i + 1]))
        return seen


def _cut(runs: list[Seen]) -> Iterator[list[Seen]]:
    """Split the tokens of a long query so that every piece has about `MAX_PARTS` parts. All runs have the same tokens."""
    from pitlane.kernels.attention import PIECE

    count = max(1, MAX_PARTS * PIECE // sum(max(PIECE, len(run.slots)) for run in runs))
    for begin in range(0, len(runs[0].tokens), count):
        piece = slice(begin, begin + count)
        yield [run._replace(tokens=run.tokens[piece], lows=run.lows[piece], highs=run.highs[piece]) for run in runs]
