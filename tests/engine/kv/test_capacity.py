"""Blocks per KV group: the rule, and what it gives a model with full and sliding layers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitlane import PromptTooLong, SamplingParams
from pitlane.engine.kv.capacity import GroupNeeds, LaneLimits, num_blocks, seq_bytes, seq_tokens
from pitlane.engine.models import presets
from pitlane.models import estimate_memory
from tests.integrity import assert_integrity

SIZE, WINDOW, STEP = 32, 64, 128
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
FULL, SLIDING = GroupNeeds(100, None), GroupNeeds(100, WINDOW)
NEED = 8  # blocks: (64 + 128) / 32, and two


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model with a full layer and a layer with a window of 64."""
    shape = replace(presets.PRESETS["tiny"], windows=(None, WINDOW))
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny-mixed": shape})
    return "random:tiny-mixed"


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def test_a_sequence_holds_a_bounded_number_of_blocks_in_a_limited_group() -> None:
    assert [seq_tokens(SLIDING, n, STEP) for n in (1, 64, 250, 4000)] == [1, 64, 250, NEED * SIZE]
    assert seq_tokens(FULL, 4000, STEP) == 4000
    assert seq_bytes([FULL, SLIDING], 4000, STEP) == (4000 + NEED * SIZE) * 100


@pytest.mark.parametrize(
    ("groups", "num_columns", "max_seqs", "expected"),
    [
        ([FULL], 50, 4, [50]),
        ([SLIDING], 50, 4, [50]),
        ([FULL, FULL], 50, 4, [50, 50]),
        ([FULL, SLIDING], 50, 2, [100 - 2 * (NEED + 1), 2 * (NEED + 1)]),  # the need of two sequences
        ([FULL, SLIDING], 50, 64, [78, 22]),  # 2.5 sequences of 1024 tokens: 32 and 8 blocks
        ([FULL, SLIDING], 6, 1, [6, 6]),  # less than a sequence needs: an equal split
        ([FULL, SLIDING, SLIDING], 50, 1, [150 - 2 * (NEED + 1), NEED + 1, NEED + 1]),
        ([SLIDING, GroupNeeds(100, 2 * WINDOW)], 50, 4, [45, 55]),  # both get all, by their needs: 9 and 11 blocks
        ([FULL, SLIDING], 0, 4, [1, 1]),
    ],
)
def test_num_blocks(groups: list[GroupNeeds], num_columns: int, max_seqs: int, expected: list[int]) -> None:
    kv_bytes = num_columns * SIZE * sum(group.bytes_per_token for group in groups)
    assert num_blocks(groups, LaneLimits(kv_bytes, 4096, STEP, max_seqs)) == expected


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, 1, 64, 4096])), min_size=1, max_size=4),
    st.integers(0, 5000),
    st.integers(1, 5000),
    st.integers(1, 64),
)
def test_the_split_fits_and_serves_a_sequence_of_any_length_that_an_equal_split_serves(
    shapes: list[tuple[int, int | None]], num_columns: int, context: int, max_seqs: int
) -> None:
    groups = [GroupNeeds(*shape) for shape in shapes]
    kv_bytes = num_columns * SIZE * sum(group.bytes_per_token for group in groups)
    counts = num_blocks(groups, LaneLimits(kv_bytes, context, STEP, max_seqs))
    assert min(counts) >= 1
    if num_columns:
        assert (
            sum(count * group.bytes_per_token * SIZE for count, group in zip(counts, groups, strict=True)) <= kv_bytes
        )
    longest = min(context, num_columns * SIZE)
    if any(group.max_tokens is None for group in groups):
        needs = [-(-seq_tokens(group, longest, STEP) // SIZE) for group in groups]
        assert all(count >= need for count, need in zip(counts, needs, strict=True))


@pytest.mark.parametrize("contexts", [1.0, 1.01, 1.05, 1.5, 2.0, 4.0])
@pytest.mark.parametrize(
    ("num_full", "num_sliding", "window", "context"),
    [
        (4, 22, 512, 32768),
        (4, 22, 1024, 8192),
        (5, 25, 1024, 32768),
        (1, 1, 4096, 8192),
        (4, 22, 512, 4096),
        (1, 9, 5, 999),
        (0, 1, 2048, 8192),
    ],
)
def test_memory_for_a_context_holds_a_sequence_of_the_context(
    num_full: int, num_sliding: int, window: int, context: int, contexts: float
) -> None:
    full = GroupNeeds(num_full * 1024 or 1024, None if num_full else window // 9)
    groups = [full, GroupNeeds(num_sliding * 1024, window), GroupNeeds(700, 2 * window)]
    kv_bytes = int(contexts * seq_bytes(groups, context + SIZE, 512))
    counts = num_blocks(groups, LaneLimits(kv_bytes, context))
    assert all(n * SIZE >= seq_tokens(group, context, 512) for n, group in zip(counts, groups, strict=True))
    assert sum(n * SIZE * group.bytes_per_token for n, group in zip(counts, groups, strict=True)) <= kv_bytes


@pytest.mark.parametrize("source", ["estimate", "contexts"])
def test_the_figures_of_kv_memory_are_true_for_a_model_with_a_window(make_engine: Any, mixed: str, source: str) -> None:
    """`pitlane memory` prints a value for `--kv-memory`; an engine prints how many contexts its KV memory holds."""
    needs = make_engine(mixed).loader.needs
    per_lane = needs.kv_bytes(4096 + SIZE)
    kv_memory = (
        4 * per_lane if source == "contexts" else estimate_memory(mixed, 4096, dtype="float64", plugins={}).kv_memory
    )
    engine = make_engine(mixed, kv_memory=kv_memory)
    assert "1.0 times the context of 4,096" in engine.loader.describe_memory() or source == "estimate"
    assert engine.lane_of(engine.default_plan).max_tokens_per_seq == 4096
    assert len(engine.generate(prompt(4094), SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2
    short = make_engine(mixed, kv_memory=4 * (per_lane - SIZE * needs.kv_per_token))
    assert "0.9 times the context of 4,096" in short.loader.describe_memory()


def test_a_long_document_takes_less_memory_and_fits_where_equal_blocks_would_not_hold_it(
    make_engine: Any, mixed: str
) -> None:
    """24 columns hold 768 tokens with equal blocks. The answers are those of an engine with room for everything."""
    bare = make_engine(mixed)
    per_token = bare.loader.needs.kv_per_token
    engine = make_engine(mixed, kv_memory=4 * 24 * SIZE * per_token, max_step_tokens=STEP)
    lane = engine.lane_of(engine.default_plan)
    full, sliding = lane.pool.allocators
    assert (len(full.counts), len(sliding.counts)) == (38, 10) and lane.max_tokens_per_seq == 38 * SIZE
    document = prompt(lane.max_tokens_per_seq - 20)
    result = engine.generate(document, PARAMS)
    assert result.token_ids == bare.generate(document, PARAMS).token_ids
    blocks = -(-(len(document) + 7) // SIZE)
    assert result.stats["kv_bytes"] == (blocks + 3) * SIZE * per_token // 2, "three blocks hold the window"
    with pytest.raises(PromptTooLong, match=f"KV memory holds {lane.max_tokens_per_seq} for prompt and answer"):
        engine.generate(prompt(lane.max_tokens_per_seq), PARAMS)


@pytest.mark.parametrize("plugins", [[], ["prefix_cache"]])
def test_many_long_prompts_share_few_blocks_of_a_window(make_engine: Any, mixed: str, plugins: list[str]) -> None:
    """The window's group has the blocks of two sequences. Five prompts, all longer than the window, ask for room at once."""
    bare = make_engine(mixed)
    per_token = bare.loader.needs.kv_per_token
    engine = make_engine(mixed, plugins=plugins, kv_memory=4 * 40 * SIZE * per_token, max_step_tokens=STEP)
    allocators = engine.lane_of(engine.default_plan).pool.allocators
    assert NEED + 1 <= len(allocators[1].counts) <= 2 * (NEED + 1)
    prompts = [prompt(300 + 40 * seed, seed) for seed in range(5)]
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    expected = [bare.generate(tokens, params).token_ids for tokens in prompts]
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(prompts, params)] == expected


@pytest.mark.usefixtures("always_draft")
def test_a_draft_model_takes_blocks_of_the_groups_without_a_limit(make_engine: Any, mixed: str, cut_tiny: str) -> None:
    """A token of the draft model takes as much as a token of the full layer: each gets half of its blocks."""
    bare = make_engine(mixed)
    per_token = bare.loader.needs.kv_per_token
    options = {"kv_memory": 4 * 40 * SIZE * per_token, "max_step_tokens": STEP}
    engine = make_engine(mixed, plugins={"speculative": {"model": cut_tiny}}, **options)
    lane = engine.lane_of(engine.default_plan)
    full, sliding = (len(allocator.counts) for allocator in lane.pool.allocators)
    assert lane.pool.withheld == [full // 2, 0] and lane.max_tokens_per_seq == full // 2 * SIZE
    assert [model.pool.num_blocks for model in lane.draft_models.values()] == [full // 2]
    tokens = prompt(400)
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.7, seed=5)
    result = engine.generate(tokens, params)
    assert result.token_ids == bare.generate(tokens, params).token_ids and result.stats["draft_tokens"] > 0
    engine.worker.call(lambda: assert_integrity(lane.pool, ())).result()


def test_the_estimate_counts_the_window_of_a_long_context(mixed: str) -> None:
    """20 blocks hold a window of 64, a step of 512 tokens, and two blocks in part."""
    token = 2 * 64 * 4  # of a layer: keys and values of a head, float32
    short, long = (estimate_memory(mixed, context, dtype="float32", plugins={}) for context in (500, 4000))
    assert short.kv_bytes == 500 * 2 * token and long.kv_bytes == (4000 + 20 * 32) * token
    assert long.kv_bytes_per_token == 2 * token and long.max_context == long.max_position == 4096
