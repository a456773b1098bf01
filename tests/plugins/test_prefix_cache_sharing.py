"""Prefix cache in memory: requests that wait for shared blocks, the order of eviction, the last turn's tail."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pitlane import PrefillProgress, SamplingParams, Sequence
from pitlane.plugins.prefix_cache.chain import Chain
from pitlane.plugins.prefix_cache.index import BlockIndex
from tests.integrity import assert_integrity, cached_columns

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
ONE = SamplingParams(max_tokens=1, ignore_eos=True)
pytestmark = pytest.mark.timeout(120)  # a request that waits for an ended request would wait for ever


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def index_of(engine: Any) -> BlockIndex:
    index: BlockIndex = engine.lane_of(engine.default_plan).state["prefix_cache"].index(True)
    return index


def submit_together(engine: Any, prompts: list[list[int]], salts: Any = ()) -> list[Any]:
    """Submit all requests between two steps."""
    streams: list[Any] = []
    pairs = [(prompt, salts[i] if salts else "") for i, prompt in enumerate(prompts)]
    add = lambda: streams.extend(engine.submit(prompt, PARAMS, salt=salt) for prompt, salt in pairs)  # noqa: E731
    engine.worker.call(add).result()
    return streams


def check_integrity(engine: Any) -> None:
    """Check the counts of blocks, and that the maps of the index agree."""
    lane = engine.lane_of(engine.default_plan)
    engine.worker.call(lambda: assert_integrity(lane.pool, [], lambda: cached_columns(lane))).result()
    index = index_of(engine)
    assert {key: use for use, keys in index.uses.items() for key in keys} == {
        k: e.use for k, e in index.entries.items()
    }
    assert {key: parent for parent, keys in index.children.items() for key in keys} == {
        k: e.parent for k, e in index.entries.items()
    }
    assert not index.computing


def test_questions_asked_at_once_wait_for_the_request_that_computes_the_document(make_engine: Any) -> None:
    engine, bare = make_engine(plugins=["prefix_cache"], max_step_tokens=2048), make_engine()
    document = tokens(0, 300)
    prompts = [document + tokens(seed, 10) for seed in range(1, 17)]
    results = [stream.result() for stream in submit_together(engine, prompts)]
    assert [result.token_ids for result in results] == [bare.generate(prompt, PARAMS).token_ids for prompt in prompts]
    cached = sorted(result.stats["cached_tokens"] for result in results)
    assert cached[0] == 0 and cached[1] >= 288
    check_integrity(engine)


def test_two_salts_asked_at_once_do_not_wait_for_each_other(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"], max_step_tokens=2048)
    prompt = tokens(0, 300)
    streams = submit_together(engine, [prompt] * 4, ("ann", "bob", "ann", ""))
    assert [stream.result().stats["cached_tokens"] for stream in streams] == [0, 0, 288, 0]


def test_no_request_waits_for_an_aborted_request(make_engine: Any) -> None:
    engine, bare = make_engine(plugins=["prefix_cache"], max_step_tokens=64), make_engine()
    document = tokens(0, 1500)
    first = engine.submit([*document, 1], PARAMS)
    prompts = [document + tokens(seed, 10) for seed in (1, 2)]
    waiting = [engine.submit(prompt, PARAMS) for prompt in prompts]
    assert isinstance(next(iter(first)), PrefillProgress)
    first.abort()
    assert [stream.result().token_ids for stream in waiting] == [bare.generate(p, PARAMS).token_ids for p in prompts]
    check_integrity(engine)


def test_no_request_waits_for_a_request_that_goes_on_without_the_plugin(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = BlockIndex.insert

    def fail(self: BlockIndex, seq: Sequence, index: int, chain: Any) -> None:
        if seq.id == 0 and index == 3:
            raise RuntimeError("a fault of our own")
        insert(self, seq, index, chain)

    monkeypatch.setattr(BlockIndex, "insert", fail)
    engine, bare = make_engine(plugins=["prefix_cache"], max_step_tokens=64), make_engine()
    prompts = [tokens(0, 700) + tokens(seed, 10) for seed in (1, 2)]
    streams = submit_together(engine, prompts)
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == [bare.generate(p, PARAMS).token_ids for p in prompts]
    assert "a fault of our own" in results[0].stats["failed"]["prefix_cache"]
    assert results[1].stats["cached_tokens"] == 96


@pytest.mark.parametrize("num_shared", [3, 4, 7])
def test_a_request_does_not_wait_for_a_few_shared_blocks(engine: Any, num_shared: int) -> None:
    pool = engine.lane_of(engine.default_plan).pool
    index, chains = BlockIndex(pool), [Chain(pool, ""), Chain(pool, ""), Chain(pool, "other")]
    for seed, chain in enumerate(chains):
        chain.upto(tokens(0, 32 * num_shared) + tokens(seed, 64), num_shared + 2)
    first, second, third = (index.wait_for(chain, 0) for chain in chains)
    assert first is None and third is None and (second is not None) == (num_shared >= 4)
    index.leave(chains[0])
    assert second is None or second.done()
    index.leave(chains[1])
    index.leave(chains[2])
    assert not index.computing


def test_the_least_recently_used_prompt_is_evicted_first_and_from_its_end(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    old, new = tokens(1, 160), tokens(2, 160)
    for prompt in (old, new, old):
        engine.generate(prompt, ONE)
    index = index_of(engine)
    engine.worker.call(lambda: index.evict([2])).result()
    assert engine.generate([*new, 1], ONE).stats["cached_tokens"] == 96  # the first 3 of 5 blocks are left
    engine.worker.call(lambda: index.evict([100])).result()
    assert not index.entries and not index.children and not index.uses
    assert engine.generate(old, ONE).stats["cached_tokens"] == 0
    check_integrity(engine)


def test_a_longer_turn_replaces_the_tail_of_the_turn_before(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    turn = tokens(1, 40)
    for _ in range(6):
        result = engine.generate(turn, ONE)
        assert result.stats["cached_tokens"] in (0, len(turn) - 3)
        turn = [*turn, *tokens(len(turn), 3)]
    assert len(index_of(engine).entries) == 2  # a full block, and the tail of the last turn
    check_integrity(engine)


def test_answers_are_right_when_memory_is_short_and_requests_abort(make_engine: Any) -> None:
    """Prompts with common beginnings, more than memory holds, two salts, every fifth aborted: right answers, no leak."""
    per_token = make_engine().loader.needs.kv_per_token
    engine = make_engine(plugins=["prefix_cache"], max_step_tokens=96, kv_memory=4 * 32 * per_token * 24)
    bare = make_engine()
    generator = random.Random(5)
    trunks = [tokens(seed, 320) for seed in range(3)]
    requests = []
    for number in range(40):
        trunk = generator.choice(trunks)[: generator.randrange(1, 320)]
        requests.append((trunk + tokens(100 + number % 7, generator.randrange(1, 60)), generator.choice(["", "ann"])))
    streams = [engine.submit(prompt, PARAMS, salt=salt) for prompt, salt in requests]
    for stream in streams[::5]:
        stream.abort()
    for (prompt, _), stream in zip(requests, streams, strict=True):
        result = stream.result()
        expected = bare.generate(prompt, PARAMS).token_ids
        assert result.token_ids == expected[: len(result.token_ids)]
        assert result.finish_reason == "aborted" or result.token_ids == expected
    check_integrity(engine)
