"""Prefix cache for models with windows: in memory under pressure, and saved documents after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from pitlane import KVState, Pool, SamplingParams, Save
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.models import presets
from pitlane.engine.models.families.core import parse_config
from pitlane.plugins import prefix_cache
from pitlane.plugins.prefix_cache.chain import Chain
from pitlane.plugins.prefix_cache.index import BlockIndex
from pitlane.storage.db import Store
from tests.integrity import assert_integrity, cached_columns
from tests.plugins import document_prompts
from tests.plugins.document_prompts import tokens

WINDOWS = {"mixed": (None, 64), "narrow": (None, 5), "all": (40, 40), "two": (33, 100)}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "sliding_window": 64,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": False,
}
SAMPLINGS = [SamplingParams(max_tokens=20, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`random:tiny-mixed` and so on: the weights of `tiny`, and a window per layer. `random:tiny-gemma`: a Gemma 3."""
    tiny = presets.PRESETS["tiny"]
    shapes = {f"tiny-{name}": replace(tiny, windows=windows) for name, windows in WINDOWS.items()}
    shapes["tiny-gemma"] = parse_config(GEMMA)
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **shapes})


chat = partial(document_prompts.chat, num_question_tokens=45)


@pytest.mark.parametrize(
    ("model", "num_saved"),
    [("random:tiny-mixed", {"group.0": 2000, "group.1": 80}), ("random:tiny-gemma", {"group.0": 80, "group.1": 2000})],
)
def test_a_long_document_is_saved_with_its_last_window_and_hit_after_a_restart(
    make_engine: Any, model: str, num_saved: dict[str, int]
) -> None:
    bare = make_engine(model)
    prompts = [chat((1, 2000)), chat((1, 2000), question=98)]
    expected = [[bare.generate(prompt, params).token_ids for params in SAMPLINGS] for prompt in prompts]
    first = make_engine(model, plugins=["prefix_cache"])
    assert [first.generate(prompts[0], params).token_ids for params in SAMPLINGS] == expected[0]
    first.close()
    with Store() as store:
        (saved,) = store.prefixes.list()
        shapes = {name: tensor.shape[3] for name, tensor in store.prefixes.load(saved).items()}
    assert shapes == num_saved, "the next token sees the last 63 tokens of the document: blocks from token 1920 on"
    for params, answers in zip(SAMPLINGS, zip(*expected, strict=True), strict=True):
        engine = make_engine(model, plugins=["prefix_cache"])
        results = [engine.generate(prompt, params) for prompt in prompts]
        assert [result.token_ids for result in results] == list(answers)
        assert results[0].stats["notes"]["prefix_cache"]["disk_tokens"] == 2000
        assert results[1].stats["notes"]["prefix_cache"]["memory_tokens"] == 2000
        engine.close()


@pytest.mark.cover(1)
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


@pytest.mark.parametrize("model", ["random:tiny-mixed", "random:tiny-gemma"])
def test_a_loaded_document_leaves_no_block_with_tokens_that_nobody_wrote(make_engine: Any, model: str) -> None:
    """The document ends within a block. The second prompt shares 31 whole blocks with it, and finds them in memory."""
    bare, first = make_engine(model), make_engine(model, plugins=["prefix_cache"])
    document = chat((1, 1000))
    shorter = [*document.token_ids[:992], *tokens(77, 3)]
    expected = [bare.generate(prompt, SAMPLINGS[1]).token_ids for prompt in (document, shorter)]
    first.generate(document, SAMPLINGS[1])
    first.close()
    engine = make_engine(model, plugins=["prefix_cache"])
    for store in engine.lane_of(engine.default_plan).stores:
        store.data.fill_(float("nan"))
    results = [engine.generate(prompt, SAMPLINGS[1]) for prompt in (document, shorter)]
    assert [result.token_ids for result in results] == expected
    assert results[0].stats["notes"]["prefix_cache"]["disk_tokens"] == 1000
    assert results[1].stats["notes"]["prefix_cache"]["memory_tokens"] == 992


def test_an_abort_while_a_document_is_loaded_saves_nothing_and_fails_no_plugin(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pitlane.engine.run.prefixes.LOAD_RATE", 1e7)  # many pieces
    first = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
    first.generate(chat((1, 98), (2, 902)), SAMPLINGS[0])
    first.close()
    engine = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
    lane = engine.lane_of(engine.default_plan)
    reader = iter(engine.submit([5] * 40, SamplingParams(max_tokens=3000, ignore_eos=True)))
    next(reader)
    stream, aborted, saves = engine.submit(chat((1, 98), (2, 902)), SAMPLINGS[0]), [], []

    def abort() -> None:
        for seq in lane.scheduler.running:
            if seq.kv.prefix is not None and seq.kv.num_computed_tokens >= 98:
                aborted.append(seq.kv.num_computed_tokens)
                engine.roster.abort([seq.id])
                saves.extend(op for op in lane.pool.queue.operations if isinstance(op, Save))

    while not aborted:
        engine.worker.call(abort).result()
        next(reader)
    result = stream.result()
    assert result.finish_reason == "aborted" and aborted[0] < 1000
    assert result.stats["failed"] == {} and saves == []


def test_a_file_with_too_few_tokens_of_a_window_is_computed_again(make_engine: Any) -> None:
    first = make_engine("random:tiny-mixed", plugins=["prefix_cache"])
    expected = first.generate(chat((1, 200)), SAMPLINGS[0]).token_ids
    first.close()
    with Store() as store:
        (saved,) = store.prefixes.list()
        tensors, token_ids = store.prefixes.load(saved), store.prefixes.token_ids(saved)
        tensors = {name: tensor[:, :, :, -71:].contiguous() for name, tensor in tensors.items()}
        store.prefixes.discard(saved)
        store.prefixes.save(saved.fingerprint, saved.block_hash, token_ids, tensors, title="1.pdf")
    result = make_engine("random:tiny-mixed", plugins=["prefix_cache"]).generate(chat((1, 200)), SAMPLINGS[0])
    assert result.token_ids == expected and result.stats["notes"]["prefix_cache"]["disk_tokens"] == 0
    assert "too few tokens of group 0; 200 are needed" in result.stats["notes"]["prefix_cache"]["discarded"][0]


def test_if_every_layer_has_a_window_no_entry_outlives_its_blocks() -> None:
    pool = Pool([KVGroup((0,), 1, 8, window=64)], [20], 32, "", None, 64)
    index = BlockIndex(pool)
    for seed in range(20):
        seq: Any = SimpleNamespace(token_ids=tokens(seed, 640), kv=KVState())
        chain, kv = Chain(pool, ""), seq.kv
        index.match(seq.token_ids, chain)
        for stop in range(64, 641, 64):
            while not pool.reserve(kv, stop):
                index.evict(pool.lacking(pool.num_missing(kv, stop)))
            kv.num_computed_tokens = stop
            while kv.num_sealed_blocks < stop // 32:
                index.insert(seq, kv.num_sealed_blocks, chain)
                kv.num_sealed_blocks += 1
            pool.drop(kv, stop)
        index.park(seq, chain)
        pool.release(kv)
        held = sum(max(entry.column) >= 0 for entry in index.entries.values())
        assert 0 < held <= 20 and len(index.entries) <= 40, "entries: held blocks, and their parents"
    index.evict([1000])
    assert not index.entries and not index.children and not index.uses and pool.num_free_blocks == 20


def cached_blocks(engine: Any) -> list[int]:
    """Number of cached blocks per KV group."""
    columns = cached_columns(engine.lane_of(engine.default_plan))
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
    assert_integrity(lane.pool, (), lambda: cached_columns(lane))
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
