"""Prefix cache: hits in memory and from disk, with the tokens of plain decoding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams, Segment
from pitlane.engine.text.tokenizer import Prompt
from tests.integrity import assert_integrity, cached_columns

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def with_document(document: list[int], question: list[int]) -> Prompt:
    return Prompt(document + question, (Segment(0, len(document), "cafe" * 16, "guide.pdf"),), "")


def plain(make_engine: Any, prompt: list[int], **options: Any) -> list[int]:
    result: list[int] = make_engine(**options).generate(prompt, PARAMS).token_ids
    return result


def check_integrity(engine: Any) -> None:
    lane = engine.lane_of(engine.default_plan)
    assert_integrity(lane.pool, [], lambda: cached_columns(lane))


@pytest.mark.parametrize("length", [33, 64, 65, 200])
def test_a_second_request_hits_and_gives_the_same_tokens(make_engine: Any, length: int) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    prompt = tokens(1, length)
    first = engine.generate(prompt, PARAMS)
    second = engine.generate(prompt, PARAMS)
    assert first.stats["cached_tokens"] == 0
    assert second.stats["cached_tokens"] == length - 1
    assert second.token_ids == first.token_ids == plain(make_engine, prompt)
    assert second.stats["bought_ms"]["prefix_cache"]["ms"] > 0
    check_integrity(engine)


def test_the_next_turn_hits_the_answer(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    prompt = tokens(1, 50)
    first = engine.generate(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    turn = prompt + first.token_ids + tokens(2, 10)
    second = engine.generate(turn, PARAMS)
    assert second.stats["cached_tokens"] == 109  # the last token of an answer is never computed
    assert second.stats["notes"]["prefix_cache"]["memory_tokens"] == 109
    assert second.token_ids == plain(make_engine, turn)


def test_a_shared_beginning_inside_a_block_is_copied(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    shared = tokens(1, 80)
    engine.generate(shared + tokens(2, 40), PARAMS)
    other = [*shared, 1, 2, 3, *tokens(3, 40)]
    result = engine.generate(other, PARAMS)
    assert result.stats["cached_tokens"] == 80
    assert result.token_ids == plain(make_engine, other)
    check_integrity(engine)


def test_two_salts_never_share(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    prompt = tokens(1, 100)
    engine.generate(prompt, PARAMS, salt="ann")
    assert engine.generate(prompt, PARAMS, salt="bob").stats["cached_tokens"] == 0
    assert engine.generate(prompt, PARAMS, salt="ann").stats["cached_tokens"] == 99


def test_cached_blocks_are_freed_when_memory_is_short(make_engine: Any) -> None:
    per_token = make_engine().loader.needs.kv_per_token
    engine = make_engine(plugins=["prefix_cache"], kv_memory=4 * 32 * per_token * 8)
    for seed in range(6):
        prompt = tokens(seed, 150)
        assert engine.generate(prompt, PARAMS).token_ids == plain(make_engine, prompt)
        check_integrity(engine)


def test_a_document_comes_back_after_a_restart(make_engine: Any) -> None:
    document, question = tokens(1, 150), tokens(2, 12)
    prompt = with_document(document, question)
    first = make_engine(plugins=["prefix_cache"])
    before = first.generate(prompt, PARAMS)
    first.close()
    again = make_engine(plugins=["prefix_cache"])
    after = again.generate(prompt, PARAMS)
    assert (before.stats["cached_tokens"], after.stats["cached_tokens"]) == (0, 150)
    assert after.token_ids == before.token_ids
    third = again.generate(with_document(document, tokens(3, 30)), PARAMS)
    assert third.stats["cached_tokens"] >= 150
    assert third.token_ids == plain(make_engine, document + tokens(3, 30))
    check_integrity(again)


def test_without_save_documents_nothing_is_written(make_engine: Any, own_home: Path) -> None:
    engine = make_engine(plugins={"prefix_cache": {"save_documents": False}})
    engine.generate(with_document(tokens(1, 150), tokens(2, 12)), PARAMS)
    engine.close()
    assert not [*own_home.rglob("*.safetensors"), *own_home.rglob("*.db")]


def test_its_cost_without_a_hit_is_small(make_engine: Any) -> None:
    """Even on a tiny model, whose step takes a millisecond. Larger models: tests/speed/test_prefix_cache.py."""
    engine = make_engine(plugins=["prefix_cache"])
    engine.generate(tokens(0, 64), PARAMS)
    before = engine.loop.step_seconds
    spent = 0.0
    for seed in range(1, 9):
        result = engine.generate(tokens(seed, 300), SamplingParams(max_tokens=64, ignore_eos=True))
        assert result.stats["cached_tokens"] <= 2
        spent += result.stats["plugin_ms"]["prefix_cache"] / 1e3
    assert spent < 0.03 * (engine.loop.step_seconds - before)
