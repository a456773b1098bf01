"""The reads of span attention: spans, shared runs, gathered contexts, and parts that merge into one softmax."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pitlane import Draft
from pitlane.plugins.span_attention import attention as span
from pitlane.plugins.span_attention import reads
from pitlane.plugins.span_attention.attention import SpanAttention
from tests.engine.run.attention_setting import MIXED, TOLERANCE, TREE, Setting, assert_near, share
from tests.engine.run.attention_setting import make_setting as make_any_setting


def make_setting(seqs: list[tuple[int, int, Draft | None]], **options: Any) -> Setting:
    return make_any_setting(seqs, attention=SpanAttention, **options)


def test_blocks_of_a_mixed_batch_are_scattered() -> None:
    """So the tests above merge several parts."""
    setting = make_setting(MIXED)
    begins, planned = setting.build_batch().query_start.tolist(), setting.prepare()
    spans = {begins.index(query.begin): [span for span, _ in query.parts] for query in planned.alone}
    assert max(map(len, spans.values())) >= 3
    assert [sum(span.stop - span.start for span in spans[row]) for row in (4, 5)] == [147, 76]


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
    monkeypatch.setattr(reads, "MIN_SHARED", min_blocks * 32 * setting.lane.pool.groups[0].bytes_per_token(dtype) // 2)
    shared = setting.prepare().shared
    assert bool(shared) == (min_blocks < 100)
    assert_near(*setting.run())


@pytest.mark.parametrize("max_tokens", [0, 1, 40, 2000])
@pytest.mark.parametrize("window", [None, 7, 33])
def test_gathered_contexts_of_any_length(window: int | None, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting([(first, 1, None) for first in (0, 1, 31, 32, 63, 64, 199, 500, 501, 37)], window=window)
    monkeypatch.setattr(
        reads, "MOST_GATHERED", max_tokens * setting.lane.pool.groups[0].bytes_per_token(torch.float64) // 2
    )
    gathers = setting.prepare().gathers
    assert bool(gathers) == (max_tokens > 1) or window == 7
    assert_near(*setting.run())


def test_the_kv_of_other_sequences_is_never_gathered() -> None:
    """NaN in other slots must not reach an answer through the padding of a gathered context."""
    setting = make_setting([(3, 1, None), (100, 1, None), (20, 1, None), (90, 1, None), (11, 1, None)])
    store = setting.lane.stores[0]
    own_slots = torch.cat([torch.tensor(setting.lane.pool.slots(seq.kv, 0, 0, seq.num_tokens)) for seq in setting.seqs])
    is_other = torch.ones(store.data.shape[3], dtype=torch.bool).index_fill_(0, own_slots, False)
    store.data[:, :, :, is_other] = float("nan")
    assert setting.prepare().gathers
    assert_near(*setting.run())


def test_shared_runs_follow_each_other_and_save_enough_reads() -> None:
    generator = random.Random(0)
    for _ in range(300):
        tables = [[generator.randint(0, 1) + 2 * place for place in range(8)] for _ in range(generator.randint(1, 6))]
        queries = [reads.Query(i, i + 1, 998, table, 0, 999, generator.randint(0, 8)) for i, table in enumerate(tables)]
        min_blocks = generator.choice([1, 2, 4])
        runs, ends = reads.shared_runs(queries, min_blocks), [0] * len(tables)
        for run in runs:
            assert (len(run.members) - 1) * (run.stop - run.start) >= min_blocks
            assert len({tuple(tables[i][run.start : run.stop]) for i in run.members}) == 1
            for i in run.members:
                assert ends[i] == run.start < run.stop <= queries[i].num_shareable
                ends[i] = run.stop
        if min_blocks == 1:  # every shared block is read once
            heads = [tuple(r.table[: n + 1]) for r in queries for n in range(r.num_shareable)]
            num_saved = sum((len(run.members) - 1) * (run.stop - run.start) for run in runs)
            assert num_saved == len(heads) - len(set(heads))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 7, 33])
def test_the_plain_path_equals_the_flash_path(window: int | None, dtype: torch.dtype) -> None:
    setting = make_setting(MIXED, window=window, dtype=dtype)
    setting.lane.built.attention.attend = span._attend_plain  # type: ignore[attr-defined]
    plain, expected = setting.run()
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
    for attend in (span._attend_flash_cpu, span._attend_plain):
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
        torch.testing.assert_close(span._merge(some_parts)[0], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(span._merge(some_parts)[1], scores.logsumexp(-1), atol=1e-12, rtol=1e-12)
    assert span._merge(parts[:1]) is parts[0]
