"""Attention over spans, chunks, trees and windows. The reference is a softmax per query in float64; a lane builds the batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pitlane import Draft, KVState, SamplingParams, Sequence
from pitlane.engine.decode.draft import depths
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.run import kv_reads
from pitlane.engine.run.attention import SpanAttention, _attend_flash_cpu, _attend_plain, _merge
from pitlane.engine.run.batch import Batch
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.lane import Lane, LaneLimits
from pitlane.engine.sequence import Request, Timing
from pitlane.kernels import attention as kernel
from pitlane.plugins.paged_attention import Paged

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

    def __post_init__(self) -> None:
        for store in self.lane.stores:
            store.data.copy_(self.random(*store.data.shape))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.lane.stores[0].data.dtype)

    def run(self, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Run the attention on a batch: output [T, H, D], and the reference in float64."""
        batch = self.lane.build_batch(self.seqs)
        store = self.lane.stores[0]
        _, _, kv_heads, _, dim = store.data.shape
        q = self.queries = self.random(batch.num_tokens, self.heads, dim)
        k, v = (self.random(batch.num_tokens, kv_heads, dim) for _ in "kv")
        attention = self.lane.built.attention
        if plain:
            cast(SpanAttention, attention).attend = _attend_plain
        store.write(1, batch.slots[0], k, v)
        out = attention(q, k, v, store, 1, batch, 0)
        assert out.shape == q.shape and out.dtype == q.dtype
        return out, torch.cat(
            [
                self.reference(seq, q[query.begin : query.end])
                for seq, query in zip(self.seqs, batch.queries, strict=True)
            ]
        )

    def reference(self, seq: Sequence, q: Tensor) -> Tensor:
        """The definition: a query sees, within the window, the tokens before its sequence's queries, its ancestors and itself."""
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
        for i, query in enumerate(q.double()):
            node, slots = first + i, []
            while node >= 0:
                if self.window is None or positions[first + i] - positions[node] < self.window:
                    slots.append(table[node // size] * size + node % size)
                node = parents[node]
            keys, values = store.data[:, 1, :, slots].double()
            keys, values = (x.repeat_interleave(self.heads // x.shape[0], 0) for x in (keys, values))
            weights = (torch.einsum("hd,hsd->hs", query, keys) * q.shape[-1] ** -0.5).softmax(-1)
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
    attention: Any = SpanAttention,
) -> Setting:
    """seqs: (tokens computed, tokens scheduled, draft). Pairs of blocks of a sequence stand in random order."""
    group = KVGroup((0, 1), heads[1], dim, window)
    total = sum(first + count + 100 for first, count, _ in seqs)
    limits = LaneLimits(group.bytes_per_token(dtype) * 2 * total, 10_000, 10_000)
    built = BuiltModel(Groups((group,)), attention(dim**-0.5, CPU), variant=None)
    lane = Lane(built, "", dtype, CPU, limits, not_called, not_called, load_drafter=not_called, call=not_called)
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
        lane.pool.reserve(seq.kv, seq.num_tokens)
        table = seq.kv.block_tables[0]
        pieces = [table[at : at + 2] for at in range(0, len(table), 2)]
        generator.shuffle(pieces)  # the pool alone would give adjacent blocks
        seq.kv.block_tables[0] = [block for piece in pieces for block in piece]
        lane.pool.drop(seq.kv, seq.kv.num_computed_tokens)
    return Setting(lane, made, heads[0], window, torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 32, 33, 61, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_a_mixed_batch(heads: tuple[int, int], window: int | None, dtype: torch.dtype) -> None:
    setting = make_setting(MIXED, heads=heads, window=window, dtype=dtype)
    assert_near(*setting.run())


def test_blocks_of_a_mixed_batch_are_scattered() -> None:
    """So the tests above merge several parts."""
    setting = make_setting(MIXED)
    batch = setting.lane.build_batch(setting.seqs)
    spans = [query.spans[0] for query in batch.queries]
    assert max(map(len, spans)) >= 3
    assert [sum(span.stop - span.start for span in own) for own in spans[2:6]] == [32, 33, 147, 76]


def share(setting: Setting, runs: list[tuple[int, int, int]]) -> None:
    """runs: (a, b, n). Sequence b gets the first n blocks of sequence a."""
    for a, b, count in runs:
        tables = [setting.seqs[i].kv.block_tables[0] for i in (a, b)]
        tables[1][:count] = tables[0][:count]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("min_blocks", [1, 3, 5, 100])
def test_shared_leading_blocks_are_read_once(
    heads: tuple[int, int], dtype: torch.dtype, min_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that decode, a tree, a chunk: six sequences share a block, and some of them share more."""
    seqs = [
        (200, 1, None),
        (199, 1, None),
        (150, 1, TREE),
        (97, 50, None),
        (64, 1, None),
        (170, 1, None),
        (31, 1, None),
    ]
    setting = make_setting(seqs, heads=heads, dtype=dtype)
    share(setting, [(0, 1, 6), (0, 2, 3), (0, 3, 3), (0, 4, 2), (0, 5, 1)])
    monkeypatch.setattr(
        kv_reads, "MIN_SHARED", min_blocks * 32 * setting.lane.pool.groups[0].bytes_per_token(dtype) // 2
    )
    shared = setting.lane.build_batch(setting.seqs).reads[0].shared
    assert bool(shared) == (min_blocks < 100)
    assert_near(*setting.run())


@pytest.mark.parametrize("max_tokens", [0, 1, 40, 2000])
@pytest.mark.parametrize("window", [None, 7, 33])
def test_gathered_contexts_of_any_length(window: int | None, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting([(first, 1, None) for first in (0, 1, 31, 32, 63, 64, 199, 500, 501, 37)], window=window)
    monkeypatch.setattr(
        kv_reads, "MOST_GATHERED", max_tokens * setting.lane.pool.groups[0].bytes_per_token(torch.float64) // 2
    )
    gathers = setting.lane.build_batch(setting.seqs).reads[0].gathers
    assert bool(gathers) == (max_tokens > 1) or window == 7
    assert_near(*setting.run())


def test_the_kv_of_other_sequences_is_never_gathered() -> None:
    """NaN in other slots must not reach an answer through the padding of a gathered context."""
    setting = make_setting([(3, 1, None), (100, 1, None), (20, 1, None), (90, 1, None), (11, 1, None)])
    store = setting.lane.stores[0]
    own_slots = torch.cat([torch.tensor(setting.lane.pool.slots(seq.kv, 0, 0, seq.num_tokens)) for seq in setting.seqs])
    is_other = torch.ones(store.data.shape[3], dtype=torch.bool).index_fill_(0, own_slots, False)
    store.data[:, :, :, is_other] = float("nan")
    assert setting.lane.build_batch(setting.seqs).reads[0].gathers
    assert_near(*setting.run())


def test_shared_runs_follow_each_other_and_save_enough_reads() -> None:
    generator = random.Random(0)
    for _ in range(300):
        tables = [[generator.randint(0, 1) + 2 * place for place in range(8)] for _ in range(generator.randint(1, 6))]
        readers = [kv_reads.Reader(i, i + 1, table, 0, 999, generator.randint(0, 8)) for i, table in enumerate(tables)]
        min_blocks = generator.choice([1, 2, 4])
        runs, ends = kv_reads.shared_runs(readers, min_blocks), [0] * len(tables)
        for run in runs:
            assert (len(run.members) - 1) * (run.stop - run.start) >= min_blocks
            assert len({tuple(tables[i][run.start : run.stop]) for i in run.members}) == 1
            for i in run.members:
                assert ends[i] == run.start < run.stop <= readers[i].num_shareable
                ends[i] = run.stop
        if min_blocks == 1:  # every shared block is read once
            heads = [tuple(r.table[: n + 1]) for r in readers for n in range(r.num_shareable)]
            num_saved = sum((len(run.members) - 1) * (run.stop - run.start) for run in runs)
            assert num_saved == len(heads) - len(set(heads))


@pytest.mark.parametrize("size", [1, 2, 13, 31, 32, 127])
@pytest.mark.parametrize("window", [None, 19])
def test_chunks_of_any_size(size: int, window: int | None) -> None:
    for first in range(0, 150, max(size, 29)):
        assert_near(*make_setting([(first, size, None)], window=window, seed=first).run())


@pytest.mark.parametrize("window", [None, 3, 8, 40])
def test_random_trees(window: int | None) -> None:
    generator = random.Random(1)
    for seed in range(25):
        size = generator.randint(1, 17)
        draft = Draft([1] * size, [generator.randrange(-1, index) if index else -1 for index in range(size)])
        assert_near(*make_setting([(generator.randint(0, 90), 1, draft)], window=window, seed=seed).run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chunk_much_longer_than_the_window(dtype: torch.dtype) -> None:
    """Some rows see no token of a whole tile, in the span before them and among the queries."""
    setting = make_setting([(1200, 1300, None)], heads=(2, 1), dim=8, window=700, dtype=dtype)
    assert_near(*setting.run())
    setting = make_setting([(40, 1100, None)], heads=(2, 1), dim=8, window=5, dtype=dtype)
    assert_near(*setting.run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 7, 33])
def test_the_plain_path_equals_the_flash_path(window: int | None, dtype: torch.dtype) -> None:
    plain, expected = make_setting(MIXED, window=window, dtype=dtype).run(plain=True)
    flash, _ = make_setting(MIXED, window=window, dtype=dtype).run()
    assert_near(plain, expected)
    torch.testing.assert_close(plain, flash, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("masked, causal", [(False, False), (False, True), (True, False)])
def test_both_paths_give_the_same_log_sum_exp(masked: bool, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    allowed = torch.rand(11, 11, generator=generator) < 0.6
    allowed.fill_diagonal_(True)
    bias = torch.zeros(11, 11, dtype=torch.float64).masked_fill(~allowed, float("-inf")) if masked else None
    scores = q @ k.transpose(-1, -2) * 0.3 + (bias if bias is not None else 0)
    scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool() & causal, float("-inf"))
    for attend in (_attend_flash_cpu, _attend_plain):
        out, lse = attend(q, k, v, bias, causal, 0.3)
        torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-12, rtol=1e-12)


def test_merging_parts_is_one_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 20, generator=generator, dtype=torch.float64) * 20
    values = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
    parts = []
    for low, high in ((0, 1), (1, 12), (12, 20)):
        part = scores[..., low:high]
        parts.append((torch.einsum("nhs,hsd->nhd", part.softmax(-1), values[:, low:high]), part.logsumexp(-1)))
    nothing = (torch.full((3, 2, 4), 7.0, dtype=torch.float64), torch.full((3, 2), float("-inf"), dtype=torch.float64))
    expected = torch.einsum("nhs,hsd->nhd", scores.softmax(-1), values)
    for some_parts in (parts, [nothing, *parts], [*parts, nothing]):
        torch.testing.assert_close(_merge(some_parts)[0], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(_merge(some_parts)[1], scores.logsumexp(-1), atol=1e-12, rtol=1e-12)
    assert _merge(parts[:1]) is parts[0]


@pytest.mark.parametrize(
    "first, count, draft", [(500, 1, None), (300, 200, None), (500, 1, Draft([1] * 7)), (500, 1, TREE)]
)
def test_the_error_in_bfloat16_is_at_most_twice_that_of_torch(first: int, count: int, draft: Draft | None) -> None:
    errors, torch_errors = [], []
    for seed in range(4):
        setting = make_setting([(first, count, draft)], heads=(8, 2), dim=64, dtype=torch.bfloat16, seed=seed)
        out, expected = setting.run()
        errors.append((out.double() - expected).abs())
        torch_errors.append((torch_attention(setting) - expected).abs())
    ratio = torch.cat(errors).pow(2).mean().sqrt() / torch.cat(torch_errors).pow(2).mean().sqrt()
    assert torch.cat(errors).max() <= 2 * torch.cat(torch_errors).max()
    assert ratio <= 2, f"root mean square of the error: {ratio:.2f} times torch's"


def torch_attention(setting: Setting) -> Tensor:
    """The attention of torch in the same dtype over the same keys, side by side: [n, H, D] as float64."""
    (seq,) = setting.seqs
    lane, first = setting.lane, seq.kv.num_computed_tokens
    batch: Batch = lane.build_batch(setting.seqs)
    store = lane.stores[0]
    num_draft = len(seq.draft.token_ids) if seq.draft else 0
    total = seq.num_tokens + num_draft
    slots = lane.pool.slots(seq.kv, 0, 0, total)
    keys, values = store.data[:, 1, :, slots]
    n = total - first
    own = (
        torch.ones(n, n, dtype=torch.bool).tril() if batch.queries[0].ancestors is None else batch.queries[0].ancestors
    )
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


# ---- the kernel in C, under the plugin's attention

here = pytest.mark.skipif(kernel.unavailable(64) is not None, reason=str(kernel.unavailable(64)))
BF16_STEP = 2.0**-8  # half the relative distance of neighbouring bfloat16 numbers


def assert_rounded(out: Tensor, expected: Tensor) -> None:
    """Assert that the output is the exact output rounded to bfloat16, up to the error of float32 sums of values about 1."""
    assert bool(((out.double() - expected).abs() <= BF16_STEP * expected.abs() + 1e-5).all())


@here
@pytest.mark.parametrize("window", [None, 1, 2, 7, 33, 61, 1000])
@pytest.mark.parametrize(
    "heads, dim", [((4, 4), 32), ((6, 2), 64), ((5, 1), 96), ((40, 2), 128), ((4, 2), 160), ((3, 3), 256)]
)
def test_paged_a_mixed_batch(heads: tuple[int, int], dim: int, window: int | None) -> None:
    setting = make_setting(MIXED, heads=heads, dim=dim, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*setting.run())


@here
@pytest.mark.parametrize("window", [None, 900])
def test_paged_contexts_of_many_pieces_beside_a_long_prompt(window: int | None) -> None:
    seqs = [(first, 1, None) for first in (0, 510, 511, 512, 513, 1023, 1024, 1700)]
    drafts = [(first, 1, TREE) for first in (500, 505, 510, 511, 1019, 1500)]
    setting = make_setting([*seqs, *drafts], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*setting.run())
    mixed = make_setting([(700, 200, None), *seqs], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*mixed.run())


@here
def test_paged_shared_blocks_are_one_task() -> None:
    seqs = [(1100, 1, None), (1090, 1, None), (1050, 1, TREE), (600, 1, None), (31, 1, None)]
    setting = make_setting(seqs, dim=64, dtype=torch.bfloat16, attention=Paged)
    share(setting, [(0, 1, 33), (0, 2, 32), (0, 3, 16)])
    parts = setting.lane.build_batch(setting.seqs).reads[0][0]
    lengths = sorted(zip(parts.tasks[:, 1].tolist(), parts.tasks[:, 3].tolist(), strict=True))
    assert lengths[-2:] == [
        (512, 12),
        (512, 13),
    ]  # 2 tokens and a tree of 10 read both runs; a further token reads the first run
    assert len(parts.tasks) == 2 + 2 + 10 + 1 + 1
    assert_rounded(*setting.run())


@here
@pytest.mark.parametrize("first", [3, 100, 505, 511, 512, 1020])
@pytest.mark.parametrize("window", [None, 40, 600])
def test_paged_a_draft_token_gets_the_bits_of_a_last_known_token(first: int, window: int | None) -> None:
    """Compare a draft chain with plain decoding and with a path of a tree, in other batches and other blocks."""
    size = 9
    chain = Draft([1] * size)
    reference = make_setting([(first, 1, chain)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    chain_out, _ = reference.run()
    start = 0 if window is None else max(0, first - window + 1)
    slots = [0] * start + reference.lane.pool.slots(reference.seqs[0].kv, 0, start, first + 1 + size)

    def answer(seqs: list[tuple[int, int, Draft | None]], index: int, path: list[int], rows: list[int]) -> Tensor:
        """The output of nodes `path` of `seqs[index]`, given the same queries, keys and values; rows: indices of the queries."""
        other = make_setting(seqs, dim=64, window=window, dtype=torch.bfloat16, attention=Paged, seed=len(path))
        batch, seq = other.lane.build_batch(other.seqs), other.seqs[index]
        own, begin = seq.kv.num_computed_tokens, batch.queries[index].begin
        low = 0 if window is None else max(0, own - window + 1)
        nodes = other.lane.pool.slots(seq.kv, 0, low, own + size + 1 if seq.draft else own + 1)
        nodes = [*nodes[: own - low], *(nodes[own - low + node] for node in path)]
        store = other.lane.stores[0]
        store.data[:, 1][:, :, nodes] = reference.lane.stores[0].data[:, 1][:, :, slots[low : low + len(nodes)]]
        q = other.random(batch.num_tokens, 4, 64)
        query_rows = [begin + node for node in path]
        q[query_rows] = reference.queries[rows]
        result: Tensor = other.lane.built.attention(q, q[:, :2], q[:, :2], store, 1, batch, 0)
        return result[query_rows]

    for length in range(1 + size):  # plain decoding of the token at `first + length`
        batch: list[tuple[int, int, Draft | None]] = [(40, 1, None), (first + length, 1, None), (7, 1, TREE)]
        assert torch.equal(answer(batch, 1, [0], [length])[0], chain_out[length])
    tree = Draft([1] * size, [-1, -1, 0, 1, 2, 3, 4, 5, 6])  # two chains, node by node in turn
    path = [0, 1, 3, 5, 7, 9]  # the last known token, and the first chain
    assert torch.equal(answer([(first, 1, tree)], 0, path, list(range(len(path)))), chain_out[: len(path)])


@here
@pytest.mark.parametrize("first, count", [(0, 300), (37, 81), (490, 200), (1000, 700)])
@pytest.mark.parametrize("window", [None, 40, 600])
def test_paged_a_token_of_a_long_prompt_gets_the_bits_of_a_decoded_one(
    first: int, count: int, window: int | None
) -> None:
    reference = make_setting([(first, count, None)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    prompt_out, _ = reference.run()
    for index in (0, 1, 71, 75, count // 2, count - 1):
        last = first + index
        other = make_setting(
            [(9, 1, TREE), (last, 1, None)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged
        )
        batch, low = other.lane.build_batch(other.seqs), 0 if window is None else max(0, last - window + 1)
        slots, prompt_slots = (
            setting.lane.pool.slots(seq.kv, 0, low, last + 1)
            for setting, seq in ((other, other.seqs[1]), (reference, reference.seqs[0]))
        )
        store = other.lane.stores[0]
        store.data[:, 1][:, :, slots] = reference.lane.stores[0].data[:, 1][:, :, prompt_slots]
        q = other.random(batch.num_tokens, 4, 64)
        q[-1] = reference.queries[index]
        assert torch.equal(other.lane.built.attention(q, q[:, :2], q[:, :2], store, 1, batch, 0)[-1], prompt_out[index])


@here
def test_paged_large_scores_and_equal_ones() -> None:
    """No score overflows, and a key with a far lower score gets no weight."""
    q = torch.zeros(1, 2, 64).bfloat16()
    q[0, 0, 0], q[0, 1, 0] = 200.0, 0.0
    keys = torch.zeros(1, 600, 64).bfloat16()
    keys[0, :, 0] = torch.linspace(-200, 200, 600)
    values = torch.randn(1, 600, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    slots = torch.arange(600).int().numpy()
    out = torch.empty_like(q)
    num_slots, zero = np.array([600]), np.array([0])
    kernel.attend(q, keys, values, kernel.Parts.of([kernel.Seen(0, slots, zero, zero, num_slots)], 1), 1.0, out)
    assert torch.equal(out[0, 0], values[0, 599])
    assert_rounded(out[0, 1], values[0].double().mean(0))
