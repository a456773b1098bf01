"""Runs a model without the engine: chunks of several sequences in one forward, with KV in scattered runs of slots."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pitlane.engine.kv.pool import Span
from pitlane.engine.kv.store import KVStore
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.llama import Llama, parts_of
from pitlane.engine.models.recorder import shapes_in
from pitlane.engine.models.registry import build_model, resolve
from pitlane.engine.models.weight_plan import Ask, WeightPlan
from pitlane.engine.run.attention import SpanAttention
from pitlane.engine.run.batch import Batch, Query

CPU = torch.device("cpu")
RUN = 8  # adjacent slots; the runs of two sequences alternate, so a sequence's KV is several spans


def load(model: str | Path, dtype: torch.dtype = torch.float32, ask: Ask | None = None) -> Llama:
    source = resolve(str(model))
    plan = WeightPlan.of(parts_of(source.config), BuildContext(source.config, dtype, CPU), ask)
    with torch.inference_mode():
        return build_model(source.config, Builder(plan, source.weights, dtype, CPU, stored_name=source.stored_name))


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name."""
    return shapes_in(parts_of(config))


class Harness:
    """One model and `num_seqs` sequences, whose slots alternate in runs."""

    def __init__(
        self, model: Llama, num_seqs: int = 2, num_tokens: int = 64, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.num_seqs = model, num_seqs
        self.stores = [KVStore(group, num_seqs * num_tokens, dtype, CPU) for group in model.kv_groups]
        self.attention = SpanAttention(model.config.attention_scale, CPU)
        self.lengths = [0] * num_seqs

    def slot(self, seq: int, index: int) -> int:
        return (index // RUN * self.num_seqs + seq) * RUN + index % RUN

    def spans(self, seq: int, first: int, stop: int) -> list[Span]:
        edges = [first, *range((first // RUN + 1) * RUN, stop, RUN), stop]
        return [Span(self.slot(seq, a), self.slot(seq, b - 1) + 1, a) for a, b in pairwise(edges) if a < b]

    def run(self, chunks: dict[int, list[int]], num_layers: int | None = None, rows: list[int] | None = None) -> Tensor:
        """Append a chunk of ids to each sequence of `chunks` in one forward. Returns logits [R, V] of `rows`, or of all."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        queries = []
        for seq, ids in chunks.items():
            first, stop = self.lengths[seq], self.lengths[seq] + len(ids)
            query = Query(len(token_ids), len(token_ids) + len(ids), [])
            end = stop if query.is_short else first
            query.spans += [self._seen(seq, first, end, group) for group in range(len(self.stores))]
            queries.append(query)
            token_ids += ids
            positions += range(first, stop)
            slots += [self.slot(seq, index) for index in range(first, stop)]
            self.lengths[seq] = stop
        slot_tensors = [torch.tensor(slots)] * len(self.stores)
        logit_rows = torch.arange(len(token_ids)) if rows is None else torch.tensor(rows)
        batch = Batch(torch.tensor(token_ids), torch.tensor(positions), slot_tensors, queries, logit_rows)
        with torch.inference_mode():
            return self.model.forward(batch, self.stores, self.attention, num_layers)

    def _seen(self, seq: int, first: int, stop: int, group: int) -> list[Span]:
        """The spans before `stop` inside the window of the query at `first`."""
        window = self.model.kv_groups[group].window
        return self.spans(seq, 0 if window is None else max(0, first + 1 - window), stop)
