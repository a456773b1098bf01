"""Quantized KV: keys and values as int8, int4 or fp8, in 0.56, 0.31 or 0.5 of the memory of bfloat16.

Changes in the loop: `build_kv_store` stores complete blocks of 32 tokens in the format, keys with a scale for each channel of a
block, values with a scale for 32 channels of a token; `build_runner` lets a token read its own block in full precision and every
earlier block in the format, also within one forward. So the answer depends on no chunk, draft, batch, cached prefix or restart.
Cached prefixes are used in whole blocks, and a draft tree ends with its block. With `attention_sinks`, sinks are read in the
format; with `key_norm_eviction`, blocks are scored by their stored keys.
Exactness: approximate. A value of int8 or int4 is off by at most half a scale: 0.2 % or 3.3 % of the range of its group; a value of
fp8 by 6 %. Metric: share of the next token's probability that moves, mean over all tokens; value: 0.13 % (int8), 2.4 % (int4),
2.7 % (fp8), and a perplexity of 78.6 becomes 78.6, 78.5 and 78.4; model: bundled in float32; text: its sample PDF (655 tokens). A
test holds bounds of 0.3 %, 5 % and 5 %.
Costs: time to quantize a block and to read it. `flash_attention` reads the format where it lies, in C or Triton; with others,
PyTorch's operations turn the blocks that a step reads into the model's dtype. Helps where KV is short: long contexts, many
sequences, many saved documents.
Paper: KIVI, https://arxiv.org/abs/2402.02750 (its full-precision part is the open block: at most 32 tokens, not the last 128)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from pitlane import Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, Forward, KVGroup, KVStorePlan, Lane, RunnerContext, Sequence
    from pitlane.plugins.kv_quant.store import QuantizedKV


class KVQuant(Plugin):
    name, role, exactness = "kv_quant", "kv_store", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        format: Literal["int8", "int4", "fp8"] = Field(
            "int8", title="Format", description="int8, int4 or fp8 (e4m3) for keys and values"
        )

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        dim = context.config.head_dim
        return f"heads of {dim} are no multiple of 8" if dim % 8 else None

    @hookimpl
    def build_kv_store(self, group: KVGroup, context: BuildContext) -> KVStorePlan:
        from pitlane import KVStorePlan
        from pitlane.plugins.kv_quant.formats import TOKENS, format_of
        from pitlane.plugins.kv_quant.store import MIN_OPEN, QuantizedKV, format_name

        rows = format_of(self.options.format, group.head_dim)
        return KVStorePlan(
            format_name(rows.name),
            2 * len(group.layers) * group.num_kv_heads * rows.num_bytes,
            lambda count, size: QuantizedKV(group, count, size, context, rows),
            saved_dim=rows.num_bytes,
            whole_blocks=True,
            serves_trims=True,
            fixed_bytes=MIN_OPEN * TOKENS * group.bytes_per_token(context.dtype),
        )

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward:
        from pitlane.plugins.kv_quant.arrange import QuantizedForward

        return QuantizedForward(forward, cast("list[QuantizedKV]", context.stores))

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        for store, allocator in zip(_stores(lane), lane.pool.allocators, strict=True):
            store.counts = allocator.counts

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int, lane: Lane) -> None:
        for store, block in zip(_stores(lane), seq.kv.column(index), strict=True):
            store.seal(block)

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        """Free the full-precision copies of the last blocks: no prefix hit uses a block that is not complete."""
        for store, table in zip(_stores(lane), seq.kv.block_tables, strict=False):
            for block in table[seq.kv.num_sealed_blocks :]:
                store.forget(block)


def _stores(lane: Lane) -> list[QuantizedKV]:
    return cast("list[QuantizedKV]", lane.stores)
