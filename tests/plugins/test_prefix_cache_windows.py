"""Prefix cache for models with windows: in memory under pressure, and saved documents after a restart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pitlane import SamplingParams, Segment
from pitlane.engine.models import presets
from pitlane.engine.text.tokenizer import Prompt
from pitlane.plugins import prefix_cache
from pitlane.storage.db import Store

WINDOWS = {"mixed": (None, 64), "narrow": (None, 5), "all": (40, 40), "two": (33, 100)}
SAMPLINGS = [SamplingParams(max_tokens=20, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`random:tiny-mixed` and so on: the weights of `tiny`, and a window per layer."""
    tiny = presets.PRESETS["tiny"]
    shapes = {f"tiny-{name}": replace(tiny, windows=windows) for name, windows in WINDOWS.items()}
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **shapes})


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def chat(*documents: tuple[int, int], question: int = 99) -> Prompt:
    """A question on documents given as (seed, length)."""
    token_ids: list[int] = []
    segments = []
    for seed, length in documents:
        segments.append(Segment(len(token_ids), len(token_ids) + length, f"{seed:064x}", f"{seed}.pdf"))
        token_ids += tokens(seed, length)
    return Prompt(token_ids + tokens(question, 45), tuple(segments), "")


def test_a_long_document_is_saved_with_its_last_window_and_hit_after_a_restart(make_engine: Any) -> None:
    bare = make_engine("random:tiny-mixed")
    prompts = [chat((1, 2000)), chat((1, 2000), question=98)]
    expected = [[bare.generate(prompt, params).token_ids for params in SAMPLINGS] for prompt in prompts]
    first = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
    assert [first.generate(prompts[0], params).token_ids for params in SAMPLINGS] == expected[0]
    first.close()
    with Store() as store:
        (saved,) = store.prefixes.list()
        shapes = {name: tensor.shape[3] for name, tensor in store.prefixes.load(saved).items()}
    assert shapes == {"group.0": 2000, "group.1": 63}, "the next token sees the last 63 tokens of the document"
    for params, answers in zip(SAMPLINGS, zip(*expected, strict=True), strict=True):
        engine = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
        results = [engine.generate(prompt, params) for prompt in prompts]
        assert [result.token_ids for result in results] == list(answers)
        assert results[0].stats["notes"]["prefix_cache"]["disk_tokens"] == 2000
        assert results[1].stats["notes"]["prefix_cache"]["memory_tokens"] == 2000
        engine.close()


@pytest.mark.parametrize("model", WINDOWS)
@pytest.mark.parametrize(("max_step_tokens", "export_tokens"), [(512, 512), (37, 64), (3, 512), (1000, 7)])
def test_documents_that_end_anywhere_are_saved_and_hit(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, model: str, max_step_tokens: int, export_tokens: int
) -> None:
    """Documents end within a block, several in a prompt. Steps end anywhere, so blocks are dropped at any place."""
    monkeypatch.setattr(prefix_cache, "EXPORT_TOKENS", export_tokens)
    name, options = f"random:tiny-{model}", {"plugins": ["prefix_cache"], "max_step_tokens": max_step_tokens}
    bare, first = make_engine(name), make_engine(name, **options)
    prompts = [chat((1, 98), (2, 77), (3, 251)), chat((1, 98), (2, 77)), chat((1, 98))]
    params = SAMPLINGS[1]
    expected = [bare.generate(prompt, params).token_ids for prompt in prompts]
    assert first.generate(prompts[0], params).token_ids == expected[0]
    first.close()
    for prompt, answer, count in zip(prompts, expected, (426, 175, 98), strict=True):
        engine = make_engine(name, **options)
        result = engine.generate(prompt, params)
        assert result.token_ids == answer and result.stats["notes"]["prefix_cache"]["disk_tokens"] == count
        engine.close()


def test_a_file_with_too_few_tokens_of_a_window_is_computed_again(make_engine: Any) -> None:
    first = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
    expected = first.generate(chat((1, 200)), SAMPLINGS[0]).token_ids
    first.close()
    with Store() as store:
        (saved,) = store.prefixes.list()
        tensors, token_ids = store.prefixes.load(saved), store.prefixes.token_ids(saved)
        tensors = {name: tensor[:, :, :, -62:].contiguous() for name, tensor in tensors.items()}
        store.prefixes.discard(saved)
        store.prefixes.save(saved.fingerprint, saved.block_hash, token_ids, tensors, title="1.pdf")
    result = make_engine("random:tiny-mixed", plugins=["prefix_cache"]).generate(chat((1, 200)), SAMPLINGS[0])
    assert result.token_ids == expected and result.stats["notes"]["prefix_cache"]["disk_tokens"] == 0
    assert "too few tokens of group 0; 200 are needed" in result.stats["notes"]["prefix_cache"]["discarded"][0]


def cached_blocks(engine: Any) -> list[int]:
    """Number of cached blocks per KV group."""
    columns = engine.lane_of(engine.default_plan).state["prefix_cache"].columns
    return [sum(column[group] >= 0 for column in columns) for group in range(2)]


@pytest.fixture
def crowded(make_engine: Any) -> Iterator[Any]:
    """22 blocks of the window's group; a sequence takes 8 of them at most, and a document of 1000 tokens has 32 blocks."""
    per_token = make_engine("random:tiny-mixed").loader.needs.kv_per_token
    options = {"max_step_tokens": 128, "kv_memory": 4 * 50 * 32 * per_token}
    yield make_engine("random:tiny-mixed", plugins={"prefix_cache": {"save_documents": False}}, **options)


def test_under_pressure_a_window_gives_back_its_earliest_blocks_and_the_document_is_still_hit(
    make_engine: Any, crowded: Any
) -> None:
    bare = make_engine("random:tiny-mixed")
    full, sliding = crowded.lane_of(crowded.default_plan).pool.allocators
    assert (len(full.counts), len(sliding.counts)) == (78, 22)
    prompts = [tokens(1, 1000) + tokens(question, 40) for question in (8, 9)]
    expected = [[bare.generate(prompt, params).token_ids for prompt in prompts] for params in SAMPLINGS]
    results = [[crowded.generate(prompt, params) for prompt in prompts] for params in SAMPLINGS]
    assert [[result.token_ids for result in row] for row in results] == expected
    assert [result.stats["cached_tokens"] for row in results for result in row] == [0, 1000, 1000, 1000]
    num_full, num_sliding = cached_blocks(crowded)
    assert num_sliding <= 22 < num_full


def test_other_documents_take_the_window_of_the_least_recent_document(make_engine: Any, crowded: Any) -> None:
    bare = make_engine("random:tiny-mixed")
    prompts = {seed: tokens(seed, 500) + tokens(9, 40) for seed in range(1, 6)}
    expected = {seed: bare.generate(prompt, SAMPLINGS[0]).token_ids for seed, prompt in prompts.items()}
    hits = []
    for seed in (1, 2, 1, 3, 1, 4, 5, 1, 5, 4, 3, 2, 1):
        result = crowded.generate(prompts[seed], SAMPLINGS[0])
        assert result.token_ids == expected[seed]
        hits.append(result.stats["cached_tokens"])
    assert hits[:3] == [0, 0, 539] and any(count > 0 for count in hits[5:]) and 0 in hits[5:]
    crowded.worker.call(lambda: None).result()
    lane = crowded.lane_of(crowded.default_plan)
    lane.pool.check_integrity((), lambda: lane.state["prefix_cache"].columns)
    lane.state["prefix_cache"].evict([1000, 1000])
    assert cached_blocks(crowded) == [0, 0] and lane.pool.num_free_blocks == lane.pool.num_blocks


def test_a_block_that_a_window_gave_back_is_taken_again_when_it_is_computed_again(
    make_engine: Any, crowded: Any
) -> None:
    prompt = tokens(1, 320)
    first = crowded.generate(prompt, SAMPLINGS[0])
    cache = crowded.lane_of(crowded.default_plan).state["prefix_cache"]
    crowded.worker.call(lambda: cache.evict([0, 22])).result()
    assert cached_blocks(crowded) == [11, 0]
    again = crowded.generate(prompt, SAMPLINGS[0])
    assert again.token_ids == first.token_ids and again.stats["cached_tokens"] == 0
    assert cached_blocks(crowded) == [11, 11], "no entry is twice in the cache"
    third = crowded.generate(prompt, SAMPLINGS[0])
    assert third.token_ids == first.token_ids and third.stats["cached_tokens"] == 319
