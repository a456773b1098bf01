"""The loop end to end on tiny random models: identical tokens however a request is run."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from pitlane import BadOption, EngineClosed, Finished, PrefillProgress, PromptTooLong, SamplingParams, TextDelta
from tests.integrity import assert_integrity


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
    assert_integrity(lane.pool, [])
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
    with pytest.raises(PromptTooLong, match="200 tokens, but KV memory holds 128"):
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
    from pitlane.engine import choices, loader

    chosen: list[int] = []
    monkeypatch.setattr(loader, "THREADS", 7)
    monkeypatch.setattr(loader.torch, "set_num_threads", chosen.append)
    make_engine()
    monkeypatch.setattr(choices, "SMALL", 0)
    make_engine()
    make_engine(threads=3)
    assert chosen == [1, 7, 3]


# ---- several prompts, several samples


def test_a_list_of_prompts_gives_results_in_order(engine: Any) -> None:
    prompts = [prompt(seed, 3 + 29 * (seed % 4)) for seed in range(9)]
    params = [SamplingParams(max_tokens=4 + seed, ignore_eos=True) for seed in range(9)]
    results = engine.generate(prompts, params)
    assert [result.token_ids for result in results] == [
        engine.generate(*pair).token_ids for pair in zip(prompts, params, strict=True)
    ]
    texts = engine.generate(["one", "two"], SamplingParams(max_tokens=3))
    assert [result.text for result in texts] == [
        engine.generate(t, SamplingParams(max_tokens=3)).text for t in ("one", "two")
    ]
    with pytest.raises(BadOption, match="9 prompts came with 2 SamplingParams"):
        engine.generate(prompts, params[:2])
    with pytest.raises(PromptTooLong):
        engine.generate([prompts[0], prompt(1, 5000)], SamplingParams(max_tokens=100_000, ignore_eos=True))
    assert _when(lambda: not engine.roster.seqs), "the others are stopped"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 100])
def test_samples_are_those_of_so_many_requests(engine: Any, length: int) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=5)
    result = engine.generate(prompt(1, length), replace(params, n=4))
    alone = [engine.generate(prompt(1, length), replace(params, sample_index=index)) for index in range(4)]
    assert [sample.token_ids for sample in result.samples] == [one.token_ids for one in alone]
    assert result.token_ids == result.samples[0].token_ids and len({tuple(one.token_ids) for one in alone}) == 4
    document = result.to_json()
    assert [sample["text"] for sample in document["samples"]] == [one.text for one in alone]


def test_the_prompt_of_samples_is_computed_and_held_once(make_engine: Any) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    least = lane.pool.num_blocks
    stream = engine.submit(prompt(1, 320), SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, n=8))
    for _ in stream:
        least = min(least, lane.pool.num_free_blocks)
    samples = stream.result().samples
    assert len(samples) == 8
    assert lane.pool.num_blocks - least <= 9 + 3 * 8, "nine blocks are shared"
    assert sum(sample.stats["steps"] for sample in samples) <= 8 * (1 + 41)


def test_samples_in_one_stream_say_whose_they_are(engine: Any) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, n=3)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    stream = engine.submit(prompt(1, 40), params)
    for event in stream:
        if isinstance(event, TextDelta):
            found[event.sample] += event.token_ids
    assert list(found.values()) == [sample.token_ids for sample in stream.result().samples]


@pytest.mark.parametrize("after", [1, 3])
def test_aborted_samples_all_end(engine: Any, after: int) -> None:
    """After the first chunk of the prompt, before there is more than one sequence; and while all of them decode."""
    stream = engine.submit(prompt(1, 700), SamplingParams(max_tokens=3000, ignore_eos=True, temperature=1.0, n=3))
    events = iter(stream)
    for _ in range(after):
        next(events)
    stream.abort()
    result = stream.result()
    assert [sample.finish_reason for sample in result.samples] == ["aborted"] * 3
    lane = engine.lane_of(engine.default_plan)
    assert not lane.has_work and lane.pool.num_free_blocks == lane.pool.num_blocks and not engine.roster.seqs


def test_preempted_samples_give_the_same_tokens(make_engine: Any) -> None:
    roomy = make_engine()
    tight = make_engine(
        kv_memory=4 * 32 * roomy.loader.needs.kv_per_token * 9
    )  # four samples want four blocks of their own
    params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=2, n=4)
    samples = tight.generate(prompt(1, 50), params).samples
    assert sum(sample.stats["preemptions"] for sample in samples) > 0
    assert [one.token_ids for one in samples] == [
        one.token_ids for one in roomy.generate(prompt(1, 50), params).samples
    ]


def test_samples_that_can_never_fit_are_refused_with_numbers(make_engine: Any) -> None:
    per_token = make_engine().loader.needs.kv_per_token
    tight = make_engine(kv_memory=4 * 32 * per_token * 6)
    waiting = tight.submit(prompt(2, 20), SamplingParams(max_tokens=5, ignore_eos=True))
    with pytest.raises(PromptTooLong, match="needs 17 KV blocks, 6 of 6 are free"):
        tight.generate(prompt(1, 40), SamplingParams(max_tokens=5, n=16))
    assert len(waiting.result().token_ids) == 5


@pytest.mark.parametrize("n", [0, 33])
def test_the_number_of_samples_is_bounded(n: int) -> None:
    with pytest.raises(BadOption, match=r"n must be in \[1, 32\]"):
        SamplingParams(n=n)


def test_lost_blocks_are_found_when_idle(make_engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    engine.generate(prompt(1, 8), SamplingParams(max_tokens=2))
    assert "KV blocks are lost" not in caplog.text
    allocator = lane.pool.allocators[0]
    (lost,) = allocator.take(1, None)
    engine.generate(prompt(1, 8), SamplingParams(max_tokens=2))
    engine.worker.call(lambda: None).result()  # the step that ended it is over, and the lane was looked at
    assert "KV blocks are lost (group 0: counts differ from references)" in caplog.text
    allocator.release(lost)


def test_whoever_reads_along_is_known(engine: Any) -> None:
    stream = engine.submit(prompt(1, 8), SamplingParams(max_tokens=3000, ignore_eos=True))
    (seq,) = _when(lambda: list(engine.roster.seqs.values()))
    assert not seq.is_streamed
    next(iter(stream))
    assert _when(lambda: seq.is_streamed)
    stream.abort()


def _when(condition: Any) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found
