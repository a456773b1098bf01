"""Runs a model without the engine: chunks of several sequences in one forward, with KV in scattered blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState
from pitlane.engine.kv.store import DenseKV, KVStore
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.decoder import Decoder, parts_of
from pitlane.engine.models.recorder import shapes_in
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.weight_plan import Ask, WeightPlan
from pitlane.engine.run.attention import PlainAttention
from pitlane.engine.run.batch import BatchBuilder, Chunk
from pitlane.engine.run.runner import EarlyExit, ModelForward

CPU = torch.device("cpu")
BLOCK = 8


def load(model: str | Path, dtype: torch.dtype = torch.float32, ask: Ask | None = None) -> Decoder:
    source = resolve(str(model))
    plan = WeightPlan.of(parts_of(source.config), BuildContext(source.config, dtype, CPU), ask)
    with torch.inference_mode():
        return Decoder(source.config, Builder(plan, source.weights, dtype, CPU, stored_name=source.stored_name))


def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name."""
    return shapes_in(parts_of(config))


class Harness:
    """One model and `num_seqs` sequences, whose blocks alternate, so that the KV of a sequence is scattered."""

    def __init__(
        self, model: Decoder, num_seqs: int = 2, num_tokens: int = 64, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        num_blocks = num_seqs * -(-num_tokens // BLOCK)
        self.pool = Pool(model.kv_groups, [num_blocks] * len(model.kv_groups), BLOCK, "")
        stores: list[KVStore] = [DenseKV(group, num_blocks, BLOCK, dtype, CPU) for group in model.kv_groups]
        self.attention = PlainAttention(BuildContext(model.config, dtype, CPU))
        self.forward = ModelForward(model, stores, self.attention, CPU)
        self.builder = BatchBuilder(self.pool)
        self.kvs = [KVState() for _ in range(num_seqs)]
        for count in range(BLOCK, num_tokens + 1, BLOCK):
            for kv in self.kvs:
                assert self.pool.reserve(kv, count)

    def run(self, chunks: dict[int, list[int]], num_layers: int | None = None, rows: list[int] | None = None) -> Tensor:
        """Append a chunk of ids to each sequence of `chunks` in one forward. Returns logits [R, V] of `rows`, or of all."""
        batch = self.builder.build([Chunk(self.kvs[seq], ids, None, False) for seq, ids in chunks.items()])
        indices = range(batch.num_tokens) if rows is None else rows
        model = self.model if num_layers is None else EarlyExit(self.model, num_layers)
        with torch.inference_mode():
            logits = replace(self.forward, model=model)(replace(batch, logit_rows=torch.tensor(list(indices)))).logits
        for seq, ids in chunks.items():
            self.kvs[seq].num_computed_tokens += len(ids)
        return logits
