"""The loop end to end on tiny random models: identical tokens however a request is run."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from pitlane import BadOption, EngineClosed, Finished, PrefillProgress, PromptTooLong, SamplingParams, TextDelta


def prompt(seed: int, length: int, vocab: int = 256) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


def ids(engine: Any, tokens: list[int], **sampling: Any) -> list[int]:
    sampling = {"max_tokens": 24, "ignore_eos": True} | sampling
    result: list[int] = engine.generate(tokens, SamplingParams(**sampling)).token_ids
    return result


def test_tokens_do_not_depend_on_the_chunk_size(make_engine: Any) -> None:
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 31, 32, 33, 97, 200))]
    whole = make_engine(max_step_tokens=512)
    for size in (1, 7, 64):
        chunked = make_engine(max_step_tokens=size)
        assert [ids(chunked, p) for p in prompts] == [ids(whole, p) for p in prompts]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7, "top_k": 50, "repetition_penalty": 1.2}])
def test_tokens_do_not_depend_on_the_batch(engine: Any, sampling: dict[str, Any]) -> None:
    prompts = [prompt(seed, 5 + 13 * seed) for seed in range(9)]
    alone = [ids(engine, p, **sampling) for p in prompts]
    params = SamplingParams(max_tokens=24, ignore_eos=True, **sampling)
    streams = [engine.submit(p, params) for p in prompts]
    assert [stream.result().token_ids for stream in streams] == alone


def test_preempted_requests_give_the_same_tokens(make_engine: Any) -> None:
    prompts = [prompt(seed, 60) for seed in range(6)]
    roomy = make_engine()
    per_token = roomy.loader.needs.kv_per_token
    tight = make_engine(kv_memory=4 * 32 * per_token * 10)  # ten blocks a lane; six requests want four each
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    streams = [tight.submit(p, params) for p in prompts]
    results = [stream.result() for stream in streams]
    assert sum(result.stats["preemptions"] for result in results) > 0
    assert [result.token_ids for result in results] == [ids(roomy, p, max_tokens=60) for p in prompts]
    lane = tight.lane_of(tight.default_plan)
    lane.pool.check_integrity([])
    assert lane.pool.num_free_blocks == lane.pool.num_blocks


def test_events_tell_the_whole_story(engine: Any) -> None:
    events = list(engine.submit(prompt(1, 700), SamplingParams(max_tokens=5, ignore_eos=True)))
    assert [type(event) for event in events[:1]] == [PrefillProgress]
    assert events[0].num_computed_tokens == 512 and events[0].num_prompt_tokens == 700
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert isinstance(events[-1], Finished)
    result = events[-1].result
    assert [token for delta in deltas for token in delta.token_ids] == result.token_ids
    assert "".join(delta.text for delta in deltas) == result.text
    assert result.finish_reason == "length"


def test_stats_have_the_documented_fields(engine: Any) -> None:
    stats = engine.generate(prompt(1, 40), SamplingParams(max_tokens=5, ignore_eos=True)).stats
    wanted = (
        "model device dtype plugins seed prompt_tokens cached_tokens completion_tokens queue_ms prefill_ms ttft_ms decode_ms "
        "tpot_ms tokens_per_second steps draft_tokens accepted_tokens plugin_ms bought_ms paused failed kv_bytes weight_bytes"
    )
    assert set(wanted.split()) <= set(stats)
    assert stats["prompt_tokens"] == 40 and stats["completion_tokens"] == 5 and stats["steps"] == 5
    assert stats["ttft_ms"] >= stats["prefill_ms"] > 0 and stats["kv_bytes"] > 0


def test_a_seed_that_is_not_given_is_random_and_reported(engine: Any) -> None:
    first = engine.generate(prompt(1, 8), SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True))
    second = engine.generate(prompt(1, 8), SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True))
    assert first.stats["seed"] != second.stats["seed"]
    again = ids(engine, prompt(1, 8), max_tokens=16, temperature=1.0, seed=first.stats["seed"])
    assert again == first.token_ids


def test_stop_token_ends_the_answer(engine: Any) -> None:
    plain = ids(engine, prompt(3, 20))
    stop = plain[5]
    result = engine.generate(prompt(3, 20), SamplingParams(max_tokens=24, stop_token_ids=(stop,)))
    assert result.token_ids == plain[: plain.index(stop) + 1]
    assert result.finish_reason == "stop"


def test_stop_text_is_cut_from_the_answer(engine: Any) -> None:
    plain = engine.generate(prompt(4, 20), SamplingParams(max_tokens=40, ignore_eos=True))
    stop = plain.text[10:13]
    result = engine.generate(prompt(4, 20), SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert result.text == plain.text[: plain.text.index(stop)]
    assert result.finish_reason == "stop" and len(result.token_ids) < len(plain.token_ids)


def test_logprobs_are_those_of_the_chosen_tokens(engine: Any) -> None:
    result = engine.generate(prompt(5, 20), SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3))
    assert result.logprobs is not None and len(result.logprobs) == 6
    for token, alternatives in zip(result.token_ids, result.logprobs, strict=True):
        assert alternatives[token] == max(alternatives.values()) and len(alternatives) == 3


def test_abort_stops_compute(engine: Any) -> None:
    stream = engine.submit(prompt(1, 10), SamplingParams(max_tokens=100_000, ignore_eos=True))
    events = iter(stream)
    next(events)
    stream.abort()
    result = stream.result()
    assert result.finish_reason == "aborted" and 0 < len(result.token_ids) < 1000
    lane = engine.lane_of(engine.default_plan)
    assert not lane.has_work and lane.pool.num_free_blocks == lane.pool.num_blocks


def test_dropping_a_stream_stops_compute(engine: Any) -> None:
    stream = engine.submit(prompt(1, 10), SamplingParams(max_tokens=100_000, ignore_eos=True))
    next(iter(stream))
    del stream
    lane = engine.lane_of(engine.default_plan)
    deadline = time.monotonic() + 20
    while lane.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_async_iteration(engine: Any) -> None:
    async def read(seed: int) -> list[int]:
        found: list[int] = []
        async for event in engine.submit(prompt(seed, 20), SamplingParams(max_tokens=12, ignore_eos=True)):
            if isinstance(event, TextDelta):
                found += event.token_ids
        return found

    async def both() -> list[list[int]]:
        return list(await asyncio.gather(read(1), read(2)))

    assert asyncio.run(both()) == [ids(engine, prompt(1, 20), max_tokens=12), ids(engine, prompt(2, 20), max_tokens=12)]


def test_a_prompt_over_the_context_is_refused_with_both_numbers(engine: Any) -> None:
    context = engine.loader.context
    with pytest.raises(PromptTooLong, match=rf"{context + 5} tokens.*{context}"):
        engine.submit(prompt(1, context + 5))
    with pytest.raises(PromptTooLong, match="empty"):
        engine.submit([])


def test_a_prompt_over_the_kv_memory_is_refused_alone(make_engine: Any) -> None:
    per_token = make_engine().loader.needs.kv_per_token
    tight = make_engine(kv_memory=4 * 32 * per_token * 4)
    running = tight.submit(prompt(1, 30), SamplingParams(max_tokens=50, ignore_eos=True))
    with pytest.raises(PromptTooLong, match="200 tokens and KV memory holds 128"):
        tight.submit(prompt(2, 200))
    assert len(running.result().token_ids) == 50


def test_the_answer_ends_at_the_context(make_engine: Any) -> None:
    small = make_engine(context=64)
    result = small.generate(prompt(1, 50), SamplingParams(max_tokens=500, ignore_eos=True))
    assert len(result.token_ids) == 14 and result.finish_reason == "length"


def test_a_closed_engine_refuses(make_engine: Any) -> None:
    engine = make_engine()
    stream = engine.submit(prompt(1, 10), SamplingParams(max_tokens=100_000, ignore_eos=True))
    next(iter(stream))
    engine.close()
    assert stream.result().finish_reason == "aborted"
    with pytest.raises(EngineClosed):
        engine.submit([1, 2, 3])
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of float64"),
        ({"device": "tpu9"}, "device 'tpu9' is unknown"),
        ({"context": 1}, "context must be in"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"kv_memory": 10}, "less than a block"),
    ],
)
def test_bad_options_are_named(make_engine: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        make_engine(**options)


def test_a_small_model_leaves_no_later_one_on_one_thread(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pitlane.engine import loader

    chosen: list[int] = []
    monkeypatch.setattr(loader, "THREADS", 7)
    monkeypatch.setattr(loader.torch, "set_num_threads", chosen.append)
    make_engine()
    monkeypatch.setattr(loader, "SMALL", 0)
    make_engine()
    make_engine(threads=3)
    assert chosen == [1, 7, 3]
