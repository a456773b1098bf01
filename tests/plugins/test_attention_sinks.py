"""Attention sinks: the logits of a plain reference, over several strides, and the same answers however they are computed."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pitlane import (
    BadOption,
    BuildContext,
    PlanConflict,
    Plugin,
    PluginRegistry,
    PromptTooLong,
    SamplingParams,
    TextDelta,
    hookimpl,
)
from pitlane.engine.kv import pool
from pitlane.engine.kv.capacity import BLOCK_SIZE
from pitlane.engine.kv.visibility import checked
from pitlane.engine.models import presets
from pitlane.engine.models.families.core import parse_config
from pitlane.engine.models.rope_config import RopeConfig
from pitlane.engine.run import batch
from pitlane.plugins.attention_sinks import BLOCK, AttentionSinks, SinkWindow
from pitlane.storage.db import Store
from pitlane.ui.chat_flow import stats_html
from pitlane.ui.refusals import refusal_of
from pitlane.ui.render import stats_line
from tests.integrity import assert_integrity, cached_columns
from tests.plugins.document_prompts import chat
from tests.plugins.sink_reference import engine_logits, reference_logits, visible_tokens

LONG = int(os.environ.get("PITLANE_TEST_SINK_TOKENS", "20000"))  # read here: a fixture clears these settings
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {
        "model_type": "llama",
        "rope_scaling": presets.LLAMA32_ROPE | {"original_max_position_embeddings": 64, "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 40, "sliding_window_pattern": 3},
}
SINKS = {"num_sinks": 4, "window": 64, "stride": 32}


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(count)]


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`random:tiny-llama` and so on, with a context of 256 tokens."""
    shapes = {f"tiny-{name}": parse_config(SHAPE | values) for name, values in MODELS.items()}
    shapes["tiny-short"] = replace(presets.PRESETS["tiny"], max_position=2048)
    shapes["tiny-short-cut"] = replace(shapes["tiny-short"], num_layers=1, windows=())
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **shapes})


def test_a_window_moves_in_strides_and_keeps_the_sinks() -> None:
    visibility = SinkWindow(4, 64, 32)
    positions = np.arange(300)
    starts = checked(visibility, 300).starts(positions)
    for position, start in zip(positions.tolist(), starts.tolist(), strict=True):
        seen = visible_tokens(position, 4, 64, 32)
        assert [*range(min(4, start)), *range(start, position + 1)] == seen
        assert len(seen) <= visibility.max_tokens and start % 32 == 0
    assert BLOCK == BLOCK_SIZE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.sizes("count", default=[150], sample=[700], whole=[700])
def test_logits_are_those_of_positions_inside_the_cache(make_engine: Any, model: str, count: int) -> None:
    """The window moves by 3 strides, in the slow tier by 20."""
    num_sinks, ids = {"llama": 40, "qwen3": 1}.get(model, 4), tokens(count)
    assert SinkWindow(num_sinks, 64, 32).starts(np.array([count - 1])) >= (count - 64) // 32 * 32
    plugins = {"attention_sinks": SINKS | {"num_sinks": num_sinks}}
    engine = make_engine(f"random:tiny-{model}", dtype="float32", plugins=plugins)
    lane = engine.lane_of(engine.default_plan)
    expected = reference_logits(lane.built.model, ids, num_sinks, 64, 32)
    for step in (1, 37):
        torch.testing.assert_close(engine_logits(lane, ids, step), expected, rtol=1e-4, atol=1e-4)
    lane = engine.lane_of(engine.plan(plugins | {"span_attention": {}}))
    for step in (1, 90):
        torch.testing.assert_close(engine_logits(lane, ids, step), expected, rtol=1e-4, atol=1e-4)
    lane = engine.lane_of(engine.plan({}))
    assert not torch.allclose(engine_logits(lane, ids, 37), expected, atol=1e-2), "the sinks change the logits"


DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {},
    "jacobi": {},
    "lookahead": {},
    "speculative": {"model": "random:tiny-short-cut"},
    "self_speculation": {"num_layers": 1},
}
PARAMS = [SamplingParams(max_tokens=90, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]


def prompts(count: int) -> list[list[int]]:
    """Prompts shorter and longer than the window and the context; a part of every second prompt repeats itself."""
    lengths = [20, 61, 150, 300, 97][:count] + [17 * number for number in range(5, count)]
    texts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    return [(text[: len(text) // 3] * 3 if seed % 2 else text) for seed, text in enumerate(texts)]


@pytest.mark.usefixtures("always_draft")
@pytest.mark.sizes("count", default=[4], sample=[20], whole=[20])
def test_answers_depend_on_no_chunk_batch_drafter_or_cache(make_engine: Any, count: int) -> None:
    texts = prompts(count)
    bare = make_engine("random:tiny-short", plugins={"attention_sinks": SINKS})
    expected = [[bare.generate(text, params).token_ids for text in texts] for params in PARAMS]
    engine = make_engine("random:tiny-short", plugins={}, max_step_tokens=23)
    for name in DRAFTERS if count > 4 else ("", "prompt_lookup", "jacobi"):
        others = {"span_attention": {}, "prefix_cache": {}} | ({name: DRAFTERS[name]} if name else {})
        plan = engine.plan({"attention_sinks": SINKS} | others)
        for params, answers in zip(PARAMS, expected, strict=True):
            results = engine.generate(texts, params, plan=plan)
            assert [result.token_ids for result in results] == answers, f"{name} {params}"
        if name:
            assert sum(result.stats["draft_tokens"] for result in results) > 0
    full = engine.generate(texts[1], PARAMS[0], plan=engine.plan({}))
    assert full.token_ids != expected[0][1], "the sinks change the answers"


@pytest.mark.parametrize(("model", "num_sinks"), [("llama", 40), ("gemma3", 4)])
def test_batches_leave_old_blocks_out(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, model: str, num_sinks: int
) -> None:
    """The same answers with short block tables: with sinks in two blocks, and beside layers with a window of their own."""
    widths: list[int] = []

    def table(tables: list[list[int]]) -> Any:
        widths.append(max(map(len, tables)))
        return as_array(tables)

    as_array = batch._table
    monkeypatch.setattr(batch, "_table", table)
    settings, params = {"attention_sinks": SINKS | {"num_sinks": num_sinks}}, replace(PARAMS[1], max_tokens=40)
    texts, answers, widest = [tokens(300), tokens(130, 1), tokens(30, 2)], [], {}
    for count, others in [(10**6, {}), (1, {}), (1, {"span_attention": {}, "prompt_lookup": {}})]:
        monkeypatch.setattr(pool, "NUM_LEFT_OUT", count)
        engine = make_engine(f"random:tiny-{model}", plugins=settings | others, max_step_tokens=50)
        answers.append([result.token_ids for result in engine.generate(texts, params)])
        widest[count] = max(widths)
        widths.clear()
    assert answers == answers[:1] * 3
    assert widest[1] <= 8 and widest[10**6] >= 339 // BLOCK_SIZE, widest


def test_kernels_in_c_keep_their_bits_when_blocks_are_left_out(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16. Blocks are left out in multiples of a piece of 512 keys, so sums keep their order."""
    engine = make_engine("random:tiny-short", dtype="bfloat16")
    kernels = ("flash_attention", "packed_linear", "fused_ops", "compiled_step")
    for name in kernels:
        reason = PluginRegistry.load().get(name).unavailable(engine.loader.build_context)
        if reason:
            pytest.skip(reason)
    settings = {"attention_sinks": SINKS} | {name: {} for name in kernels}
    answers, params = [], SamplingParams(max_tokens=40, ignore_eos=True, logprobs=3)
    for count in (16, 10**6):
        monkeypatch.setattr(pool, "NUM_LEFT_OUT", count)
        engine = make_engine("random:tiny-short", dtype="bfloat16", plugins=settings)
        answers.append(engine.generate([tokens(1100), tokens(690, 1)], params))
    assert [result.token_ids for result in answers[0]] == [result.token_ids for result in answers[1]]
    assert [result.logprobs for result in answers[0]] == [result.logprobs for result in answers[1]]


def test_an_answer_outgrows_the_context_in_few_blocks(make_engine: Any) -> None:
    engine = make_engine("random:tiny-llama", plugins={"attention_sinks": SINKS}, max_step_tokens=64)
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    result = engine.generate(tokens(30), params)
    assert len(result.token_ids) == 500 and result.finish_reason == "length"
    lane = engine.lane_of(engine.default_plan)
    limit = lane.pool.max_blocks[0] * BLOCK_SIZE * engine.loader.needs.kv_per_token
    assert 0 < result.stats["kv_bytes"] <= limit and lane.pool.num_free_blocks == lane.pool.num_blocks
    assert result.stats["notes"]["attention_sinks"] == {"dropped_tokens": 476, "dropped": [4, 480]}
    assert "attention_sinks dropped tokens 5 to 480" in stats_line(result.stats)
    title = "the model no longer sees tokens 5 to 480 of 530"
    assert f'title="{title}">dropped <b>476</b> tokens' in stats_html(result.stats, {})
    short = engine.generate(tokens(30), SamplingParams(max_tokens=30, ignore_eos=True))
    assert "attention_sinks" not in short.stats["notes"] and "dropped" not in stats_line(short.stats)
    without = engine.generate(tokens(30), params, plan=engine.plan({}))
    assert len(without.token_ids) == 226, "without the plugin, the context ends the answer"


def test_a_prompt_longer_than_the_context_names_the_plugin(make_engine: Any) -> None:
    engine = make_engine("random:tiny-llama")
    sinks = engine.plan({"attention_sinks": SINKS})
    assert len(engine.generate(tokens(700), PARAMS[0], plan=sinks).token_ids) == 90
    with pytest.raises(PromptTooLong, match="context holds 256 tokens") as caught:
        engine.submit(tokens(700))
    assert "turn on" not in str(caught.value), "the default window is larger than this context"
    engine = make_engine("random:tiny-short", context=256)
    with pytest.raises(PromptTooLong, match="or turn on attention_sinks, which drops the middle") as caught:
        engine.submit(tokens(700))
    assert refusal_of(caught.value, [], [], ["a"]).ways == (
        ("turn_on", "attention_sinks"),
        ("take_out", "a"),
        ("edit", ""),
    )


@pytest.mark.parametrize("num_sinks", [pytest.param(4, marks=pytest.mark.slow), 40])
def test_a_document_longer_than_the_context_is_saved_and_hit(make_engine: Any, num_sinks: int) -> None:
    settings = {"attention_sinks": SINKS | {"num_sinks": num_sinks}}
    bare = make_engine("random:tiny-gemma3", plugins=settings)
    texts = [chat((1, 30), (2, 570)), chat((1, 30), (2, 570), question=98)]
    expected = [[bare.generate(text, params).token_ids for params in PARAMS] for text in texts]
    first = make_engine("random:tiny-gemma3", plugins=settings | {"prefix_cache": {"min_tokens": 31}})
    assert [first.generate(texts[0], params).token_ids for params in PARAMS] == expected[0]
    first.close()
    with Store() as store:
        (saved,) = store.prefixes.list()
        sizes = [store.prefixes.load(saved)[f"group.{group}"].shape[3] for group in range(2)]
    # Token 576 sees the tokens from 544 on, in layers with a window of their own from 537 on: whole blocks from 512 on.
    assert sizes == [600 - 512, 32 * -(-num_sinks // 32) + 600 - 544]
    engine = make_engine("random:tiny-gemma3", plugins=settings | {"prefix_cache": {}})
    for store in engine.lane_of(engine.default_plan).stores:
        store.data.fill_(float("nan"))
    for params, answers in zip(PARAMS, zip(*expected, strict=True), strict=True):
        results = [engine.generate(text, params) for text in texts]
        assert [result.token_ids for result in results] == list(answers)
        assert results[1].stats["notes"]["prefix_cache"]["memory_tokens"] >= 600
    assert results[0].stats["cached_tokens"] >= 600
    engine.close()


def test_under_pressure_sinks_are_given_back_last(make_engine: Any) -> None:
    """A prompt takes 7 of 30 blocks at most. Sequences are preempted, and blocks of the cache are given back."""
    bare = make_engine("random:tiny-llama", plugins={"attention_sinks": SINKS})
    per_block = BLOCK_SIZE * bare.loader.needs.kv_per_token
    texts = [tokens(300, 1) + tokens(30, seed) for seed in range(2, 6)] + [tokens(280, 9)]
    expected = [bare.generate(text, PARAMS[0]).token_ids for text in texts]
    settings = {"attention_sinks": SINKS, "prefix_cache": {"save_documents": False}}
    engine = make_engine("random:tiny-llama", plugins=settings, kv_memory=4 * 30 * per_block, max_step_tokens=64)
    lane = engine.lane_of(engine.default_plan)
    assert lane.pool.num_blocks == 30
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(texts, PARAMS[0])] == expected
    hits = [engine.generate(text, PARAMS[0]).stats["cached_tokens"] for text in (texts[0], texts[0], texts[1])]
    assert hits[1] >= 320, hits
    engine.worker.call(lambda: None).result()
    assert_integrity(lane.pool, (), lambda: cached_columns(lane))
    lane.state["prefix_cache"].evict([1000])
    assert lane.pool.num_free_blocks == lane.pool.num_blocks


def test_options_are_rounded_to_blocks_and_refused_with_the_reason(make_engine: Any) -> None:
    engine = make_engine("random:tiny-llama")
    rounded = engine.plan({"attention_sinks": {"window": 65, "stride": 33}}).settings["attention_sinks"]
    assert rounded == {"num_sinks": 4, "window": 96, "stride": 64}
    for options, reason in [
        ({}, "4 sinks and a window of 1024 tokens exceed the model's context of 256"),
        ({"window": 64, "stride": 96}, "stride 96 is larger than window 64"),
    ]:
        with pytest.raises(BadOption, match=reason):
            engine.plan({"attention_sinks": options})


def test_models_whose_keys_or_state_would_go_stale_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def context(**changes: Any) -> BuildContext:
        config = replace(parse_config(SHAPE | MODELS["llama"]), **changes)
        return BuildContext(config, torch.float32, torch.device("cpu"))

    assert AttentionSinks.unavailable(context()) is None
    assert "RoPE of kind dynamic" in str(AttentionSinks.unavailable(context(rope=RopeConfig(kind="dynamic"))))
    for name, reason in [("learned_sinks", "learned attention sinks"), ("recurrent_layers", "recurrent layers")]:
        fake: Any = SimpleNamespace(rope_of=lambda layer: None, num_layers=1, **{name: (0,)})
        assert reason in str(AttentionSinks.unavailable(BuildContext(fake, torch.float32, torch.device("cpu"))))
    plugin = AttentionSinks(AttentionSinks.Options(**SINKS))
    assert "layers have windows of their own, of at most 40" in str(plugin.refusal(context(windows=(40, 30, 40))))


def test_an_attention_that_cannot_read_sinks_is_refused(make_engine: Any) -> None:
    class Plain:
        formats = None

        def prepare(self, batch: Any, group: int) -> None: ...

        def __call__(self, *arguments: Any) -> None: ...

    class Old(Plugin):
        name, role, exactness = "old", "attention", "rounding"

        @hookimpl
        def build_attention(self, context: BuildContext) -> Any:
            return Plain()

    registry = PluginRegistry.load()
    registry.add(Old)
    engine = make_engine("random:tiny-llama", registry=registry)
    with pytest.raises(PlanConflict, match="old cannot read attention sinks, which attention_sinks keeps"):
        engine.lane_of(engine.plan({"old": {}, "attention_sinks": SINKS}))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_answer_takes_even_time_and_memory(make_engine: Any) -> None:
    """Reads PITLANE_TEST_SINK_TOKENS: the length of the answer, 20,000 tokens without it."""
    engine = make_engine("random:tiny-short", dtype="float32", plugins={"attention_sinks": SINKS, "span_attention": {}})
    stream = engine.submit(tokens(30), SamplingParams(max_tokens=LONG, ignore_eos=True))
    lane, held, times, memory = engine.lane_of(engine.default_plan), [], [], []
    for event in stream:
        if isinstance(event, TextDelta) and event.token_ids:
            times.append(time.perf_counter())
            held.append(lane.pool.num_blocks - lane.pool.num_free_blocks)
            if len(times) % 1000 == 0:
                memory.append(resident_bytes())
    quarter = len(times) // 4
    early, late = times[2 * quarter] - times[quarter], times[-1] - times[-1 - quarter]
    assert len(times) > LONG - 50 and max(held) <= lane.pool.max_blocks[0]
    assert max(held[-quarter:]) <= max(held[quarter : 2 * quarter])
    assert late < 1.3 * early, (early, late)
    grown, num_tokens = memory[-1] - memory[len(memory) // 4], len(times) * 3 / 4
    assert grown < 4e6 + 64 * num_tokens, f"{grown / num_tokens:.0f} bytes a token; ids, times and text need about 20"


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
