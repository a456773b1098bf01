"""A lane with random KV and a batch of sequences, for tests of attentions. The reference is a softmax per query in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pitlane import BuildContext, Draft, KVState, PlainAttention, SamplingParams, Sequence
from pitlane.engine.decode.draft import depths
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import dense_plan
from pitlane.engine.kv.visibility import visibility_of
from pitlane.engine.run.attention import ancestors
from pitlane.engine.run.batch import Batch
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.lane import Lane, LaneLimits
from pitlane.engine.sequence import Request, Timing
from pitlane.plugins.attention_sinks import SinkWindow

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def not_called(*_: Any) -> Any:
    raise AssertionError("not called here")


@dataclass
class Groups:
    """The part of a model that a lane needs to build batches."""

    kv_groups: tuple[KVGroup, ...]
    forward = staticmethod(not_called)


@dataclass
class Setting:
    """A lane of one KV group with random keys and values, and the sequences of one batch. queries: [T, H, D] of the last run."""

    lane: Lane
    seqs: list[Sequence]
    heads: int
    window: int | None
    generator: torch.Generator
    queries: Tensor = field(default_factory=lambda: torch.empty(0))
    sinks: SinkWindow | None = None

    def __post_init__(self) -> None:
        for store in self.lane.stores:
            store.data.copy_(self.random(*store.data.shape))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.lane.stores[0].data.dtype)

    def build_batch(self) -> Batch:
        return self.lane.build_batch(self.seqs)

    def prepare(self, batch: Batch | None = None) -> Any:
        """The reads that the attention plans for a batch."""
        return self.lane.built.attention.prepare(batch or self.build_batch(), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, *sink_q: Tensor) -> Tensor:
        return self.lane.built.attention(q, k, v, self.lane.stores[0], 1, self.prepare(batch), *sink_q)

    def run(self) -> tuple[Tensor, Tensor]:
        """Run the attention on a batch: output [T, H, D], and the reference in float64."""
        batch, store = self.build_batch(), self.lane.stores[0]
        _, _, kv_heads, _, dim = store.data.shape
        q = self.queries = self.random(batch.num_tokens, self.heads, dim)
        k, v = (self.random(batch.num_tokens, kv_heads, dim) for _ in "kv")
        store.write(1, batch.groups[0].slots, k, v)
        has_sinks = batch.groups[0].sink_positions is not None
        sink_q = self.random(*q.shape) if has_sinks else q
        out = self.attend(q, k, v, batch, *((sink_q,) if has_sinks else ()))
        assert out.shape == q.shape and out.dtype == q.dtype
        pairs = zip(self.seqs, pairwise(batch.query_start.tolist()), strict=True)
        return out, torch.cat([self.reference(seq, q[a:b], sink_q[a:b]) for seq, (a, b) in pairs])

    def start(self, position: int) -> int:
        """The first token that a position sees in its window."""
        if self.sinks is None:
            return 0 if self.window is None else max(0, position + 1 - self.window)
        return int(self.sinks.starts(np.array([position]))[0])

    def reference(self, seq: Sequence, q: Tensor, sink_q: Tensor) -> Tensor:
        """The definition: a query sees, within the window, the tokens before its sequence's queries, its ancestors and itself.

        It also sees the sinks before the window, with a second query.
        """
        first = seq.kv.num_computed_tokens
        store, table = self.lane.stores[0], seq.kv.block_tables[0]
        size = self.lane.pool.block_size
        positions = list(range(seq.num_tokens if seq.draft else first + seq.num_scheduled_tokens))
        parents = list(range(-1, len(positions) - 1))
        if seq.draft is not None:
            links = seq.draft.parents or list(range(-1, len(seq.draft.token_ids) - 1))
            parents += [seq.num_tokens + parent for parent in links]
            positions += [seq.num_tokens - 1 + depth for depth in depths(links)]
        out = []
        for i, queries in enumerate(torch.stack((q, sink_q), 1).double()):
            node, slots, kinds = first + i, [], []
            start = self.start(positions[node])
            while node >= 0:
                is_sink = self.sinks is not None and positions[node] < min(start, self.sinks.num_sinks)
                if positions[node] >= start or is_sink:
                    slots.append(table[node // size] * size + node % size)
                    kinds.append(int(is_sink))
                node = parents[node]
            keys, values = store.data[:, 1, :, slots].double()
            keys, values = (x.repeat_interleave(self.heads // x.shape[0], 0) for x in (keys, values))
            weights = (torch.einsum("shd,hsd->hs", queries[kinds], keys) * q.shape[-1] ** -0.5).softmax(-1)
            out.append(torch.einsum("hs,hsd->hd", weights, values))
        return torch.stack(out)


def make_setting(
    seqs: list[tuple[int, int, Draft | None]],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: Any = PlainAttention,
    sinks: SinkWindow | None = None,
) -> Setting:
    """seqs: (tokens computed, tokens scheduled, draft). Pairs of blocks of a sequence stand in random order."""
    group = KVGroup((0, 1), heads[1], dim, window)
    total = sum(first + count + 100 for first, count, _ in seqs)
    limits = LaneLimits(group.bytes_per_token(dtype) * 2 * total, 10_000, 10_000)
    config: Any = SimpleNamespace(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, attention_scale=dim**-0.5, kv_groups=(group,)
    )
    context = BuildContext(config, dtype, CPU)
    parts = ([], False, (), (visibility_of(group, sinks),), (dense_plan(group, dtype, CPU),))
    built = BuiltModel(Groups((group,)), attention(context), cast(Any, None), context, *parts)
    tokenizer: Any = None
    lane = Lane(built, "", dtype, CPU, limits, not_called, not_called, not_called, not_called, tokenizer)
    made = []
    for number, (first, count, draft) in enumerate(seqs):
        seq = Sequence(
            id=number,
            request=Request(1, SamplingParams(max_tokens=10_000), seed=0),
            plan=cast(Any, None),
            token_ids=[1] * (first + count),
            detokenizer=cast(Any, None),
            timing=Timing(0.0),
            kv=KVState(num_computed_tokens=first),
            draft=draft,
            num_scheduled_tokens=count,
        )
        made.append(seq)
    generator = random.Random(seed)
    for seq in made:
        assert lane.pool.reserve(seq.kv, seq.num_tokens)
        table = seq.kv.block_tables[0]
        pieces = [table[at : at + 2] for at in range(0, len(table), 2)]
        generator.shuffle(pieces)  # the pool alone would give adjacent blocks
        seq.kv.block_tables[0] = [block for piece in pieces for block in piece]
        lane.pool.drop(seq.kv, seq.kv.num_computed_tokens)
    return Setting(lane, made, heads[0], window, torch.Generator().manual_seed(seed), sinks=sinks)


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


TREE = Draft([1] * 9, [-1, -1, 0, 0, 1, 2, 4, 5, -1])
LOOKAHEAD = Draft([1] * 12, [-1, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8])  # columns of a window of three
MIXED: list[tuple[int, int, Draft | None]] = [
    (0, 1, None),
    (0, 37, None),
    (31, 1, None),
    (32, 1, None),
    (97, 50, None),
    (70, 1, Draft([1] * 5)),
    (150, 1, TREE),
    (0, 1, LOOKAHEAD),
    (199, 1, None),
    (63, 1, Draft([1])),
]


def share(setting: Setting, runs: list[tuple[int, int, int]]) -> None:
    """runs: (a, b, n). Sequence b gets the first n blocks of sequence a."""
    for a, b, count in runs:
        tables = [setting.seqs[i].kv.block_tables[0] for i in (a, b)]
        tables[1][:count] = tables[0][:count]


def torch_attention(setting: Setting) -> Tensor:
    """The attention of torch in the same dtype over the same keys, side by side: [n, H, D] as float64."""
    (seq,) = setting.seqs
    lane, first = setting.lane, seq.kv.num_computed_tokens
    store = lane.stores[0]
    num_draft = len(seq.draft.token_ids) if seq.draft else 0
    total = seq.num_tokens + num_draft
    slots = lane.pool.slots(seq.kv, 0, 0, total)
    keys, values = store.data[:, 1, :, slots]
    n = total - first
    parents = setting.build_batch().parents.numpy()
    own = torch.from_numpy(ancestors(parents))
    mask = torch.cat([torch.ones(n, first, dtype=torch.bool), own], 1)
    bias = torch.zeros(mask.shape, dtype=keys.dtype).masked_fill(~mask, float("-inf"))
    out = torch.nn.functional.scaled_dot_product_attention(
        setting.queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=bias,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).double()
