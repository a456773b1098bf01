"""Quantized KV with attention sinks and with key-norm eviction: a plain reference, and answers that no chunk or batch changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pitlane import PluginRegistry, SamplingParams
from pitlane.plugins.kv_quant.formats import format_of
from tests.plugins import key_norm_reference, sink_reference
from tests.plugins.document_prompts import chat
from tests.plugins.quant_trim_reference import Norms, Sinks, reference_logits

FORMATS = ["int8", "int4", "fp8"]
each_format = pytest.mark.parametrize("name", FORMATS)
SINKS = {"num_sinks": 4, "window": 64, "stride": 32}
NORMS = {"budget": 96, "recent": 32, "interval": 64}
TRIMS: dict[str, dict[str, Any]] = {"attention_sinks": SINKS, "key_norm_eviction": NORMS}
each_trim = pytest.mark.parametrize("trim", TRIMS)
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"min_ngram": 1},
    "jacobi": {},
    "lookahead": {},
    "speculative": {"model": "random:tiny-cut"},
    "self_speculation": {"num_layers": 1},
}
TREES = {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4}}
PARAMS = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(count)]


def prompts(count: int) -> list[list[int]]:
    """Prompts shorter and longer than the window and the budget; a part of every second prompt repeats itself."""
    texts = [tokens(length, seed) for seed, length in enumerate([50, 96, 201, 170, 70, *range(150, 600, 30)][:count])]
    return [(text[: len(text) // 3] * 3 if seed % 2 else text) for seed, text in enumerate(texts)]


@pytest.mark.parametrize(("name", "num_sinks"), [("int8", 4), ("int4", 40), ("fp8", 1)])
def test_logits_with_sinks_are_those_of_a_plain_reference(make_engine: Any, name: str, num_sinks: int) -> None:
    """In float64, over five strides, in steps of one token and of several blocks."""
    ids, options = tokens(230), SINKS | {"num_sinks": num_sinks}
    plugins: dict[str, Any] = {"attention_sinks": options, "kv_quant": {"format": name}}
    engine = make_engine(plugins=plugins)
    lane = engine.lane_of(engine.default_plan)
    expected = reference_logits(lane.built.model, ids, format_of(name, lane.stores[0].group.head_dim), Sinks(**options))
    others = engine.lane_of(engine.plan(plugins | {"span_attention": {}}))
    for case, step in ((lane, 37), (others, 1), (others, 90)):
        torch.testing.assert_close(sink_reference.engine_logits(case, ids, step), expected, rtol=1e-8, atol=1e-8)
    for fewer in ({"attention_sinks": options}, {"kv_quant": {"format": name}}):
        logits = sink_reference.engine_logits(engine.lane_of(engine.plan(fewer)), ids, 37)
        assert not torch.allclose(logits, expected, atol=1e-4), "both plugins change the logits"


@each_format
def test_logits_and_blocks_under_eviction_are_those_of_a_plain_reference(make_engine: Any, name: str) -> None:
    """The blocks are scored by their stored keys."""
    ids, plugins = tokens(230), {"key_norm_eviction": NORMS, "kv_quant": {"format": name}}
    engine = make_engine(plugins=plugins)
    lane, policy = engine.lane_of(engine.default_plan), Norms(**NORMS)
    expected = reference_logits(lane.built.model, ids, format_of(name, lane.stores[0].group.head_dim), policy)
    others = engine.lane_of(engine.plan(plugins | {"span_attention": {}}))
    for case, step in ((lane, 37), (others, 1), (others, 90)):
        logits, left = key_norm_reference.engine_logits(case, ids, step)
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
        assert left == policy.held and left != list(range(len(left)))


@pytest.mark.usefixtures("always_draft", "cut_tiny")
@pytest.mark.sizes("count", default=[4], sample=[20], whole=[20])
@each_trim
def test_answers_depend_on_no_chunk_batch_drafter_or_cache(make_engine: Any, trim: str, count: int) -> None:
    texts = prompts(count)
    for name in FORMATS if count > 4 else ("int4",):
        plugins: dict[str, Any] = {trim: TRIMS[trim], "kv_quant": {"format": name}}
        bare = make_engine(plugins=plugins)
        expected = [[bare.generate(text, params).token_ids for text in texts] for params in PARAMS]
        engine = make_engine(plugins={}, max_step_tokens=43)
        cache: dict[str, Any] = {"prefix_cache": {}} if trim == "attention_sinks" else {}
        drafters = [TREES, *({key: DRAFTERS[key]} for key in (DRAFTERS if count > 4 else ("lookahead",)))]
        for drafter in drafters:
            plan = engine.plan({**plugins, "span_attention": {}, **cache, **drafter})
            for params, answers in zip(PARAMS, expected, strict=True):
                results = engine.generate(texts, params, plan=plan)
                assert [result.token_ids for result in results] == answers, f"{drafter} {params}"
            assert sum(result.stats["draft_tokens"] for result in results) > 0
            assert sum(result.stats["cached_tokens"] for result in results) > 0 or not cache
        assert results[2].stats["notes"][trim]["dropped_tokens"] > 0


@each_trim
def test_samples_and_preempted_sequences_give_the_same_answers(make_engine: Any, trim: str) -> None:
    """All sequences start with two blocks, and outgrow the memory before they drop blocks."""
    plugins: dict[str, Any] = {trim: TRIMS[trim], "kv_quant": {}}
    params = SamplingParams(max_tokens=130, ignore_eos=True)
    bare = make_engine(plugins=plugins)
    texts = [tokens(40 + seed, seed) for seed in range(8)]
    expected = [bare.generate(text, params).token_ids for text in texts[:4]]
    engine = make_engine(plugins=plugins, kv_memory=2**20, max_step_tokens=32)
    lane = engine.lane_of(engine.default_plan)
    assert lane.pool.num_blocks == 21
    results = engine.generate([*texts[4:], *texts[:4]], params)
    assert [result.token_ids for result in results[4:]] == expected
    assert sum(result.stats["preemptions"] for result in results) > 0
    assert all(result.stats["notes"][trim]["dropped_tokens"] > 0 for result in results)
    sampled = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=3, n=3)
    samples, alone = (e.generate(tokens(150), sampled).samples for e in (engine, bare))
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in alone]
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    engine.worker.call(lambda: None).result()
    assert lane.pool.num_free_blocks == lane.pool.num_blocks


@pytest.mark.parametrize("num_sinks", [pytest.param(4, marks=pytest.mark.slow), 40])
def test_a_long_document_is_saved_in_the_format_and_hit_after_a_restart(make_engine: Any, num_sinks: int) -> None:
    """Dropped blocks are not saved. Sinks and window come back as rows of the format."""
    plugins: dict[str, Any] = {"attention_sinks": SINKS | {"num_sinks": num_sinks}, "kv_quant": {"format": "int4"}}
    texts = [chat((1, 30), (2, 400)), chat((1, 30), (2, 400), question=98)]
    bare = make_engine(plugins=plugins)
    expected = [[bare.generate(text, params).token_ids for params in PARAMS] for text in texts]
    from_disk = []
    for is_second in (False, True):
        engine = make_engine(plugins=plugins | {"prefix_cache": {"min_tokens": 31}}, max_step_tokens=50)
        for text, answers in zip(texts, expected, strict=True):
            results = [engine.generate(text, params) for params in PARAMS]
            assert [result.token_ids for result in results] == answers
            cached = [result.stats["cached_tokens"] for result in results]
            assert cached[1] >= 416 and (cached[0] >= 416 or not (is_second or text is texts[1])), cached
            from_disk.append(results[0].stats["notes"].get("prefix_cache", {}).get("disk_tokens", 0))
        engine.close()
    assert from_disk[0] == from_disk[1] == from_disk[3] == 0 and from_disk[2] >= 416, from_disk


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("name", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4", "fp8"))])
@each_trim
def test_the_kernels_in_c_give_equal_bits_in_any_chunk_draft_or_batch(make_engine: Any, name: str, trim: str) -> None:
    """In bfloat16, with linears, operations and attention in C."""
    kernels = ("flash_attention", "packed_linear", "fused_ops", "compiled_step")
    engine = make_engine(dtype="bfloat16")
    for kernel in kernels:
        reason = PluginRegistry.load().get(kernel).unavailable(engine.loader.build_context)
        if reason:
            pytest.skip(reason)
    plugins: dict[str, Any] = {trim: TRIMS[trim], "kv_quant": {"format": name}} | {kernel: {} for kernel in kernels}
    alone = make_engine(dtype="bfloat16", plugins=plugins)
    expected = [alone.generate(text, PARAMS[1]) for text in prompts(4)]
    small = make_engine(dtype="bfloat16", plugins={}, max_step_tokens=43)
    for drafter in ({}, TREES, {"lookahead": {}}):
        results = small.generate(prompts(4), PARAMS[1], plan=small.plan(plugins | drafter))
        assert [result.token_ids for result in results] == [result.token_ids for result in expected], drafter
    assert expected[2].stats["notes"][trim]["dropped_tokens"] > 0
