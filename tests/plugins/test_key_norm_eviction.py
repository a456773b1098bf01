"""Key-norm eviction: the logits and blocks of a plain reference, and the same answers however they are computed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pitlane import BadOption, BuildContext, KVGroup, PlanConflict, Plugin, PluginFailed, PluginRegistry, SamplingParams
from pitlane.engine.kv.capacity import BLOCK_SIZE
from pitlane.engine.kv.visibility import checked_eviction, evicts
from pitlane.engine.models import presets
from pitlane.plugins.key_norm_eviction import BLOCK, KeyNormEviction, KeyNorms
from pitlane.ui.chat_flow import stats_html
from pitlane.ui.render import stats_line
from tests.integrity import assert_integrity
from tests.plugins.key_norm_reference import engine_logits, reference_logits

OPTIONS = {"budget": 96, "recent": 32, "interval": 64}
SETTINGS: dict[str, Any] = {"key_norm_eviction": OPTIONS}
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {},
    "jacobi": {},
    "lookahead": {},
    "speculative": {"model": "random:tiny-cut"},
    "self_speculation": {"num_layers": 1},
}
PARAMS = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.9)]


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(count)]


def prompts(count: int) -> list[list[int]]:
    """Prompts shorter and longer than the budget; a part of every second prompt repeats itself."""
    texts = [tokens(length, seed) for seed, length in enumerate([50, 96, 201, 170, 70, *range(150, 600, 30)][:count])]
    return [(text[: len(text) // 3] * 3 if seed % 2 else text) for seed, text in enumerate(texts)]


@pytest.mark.parametrize("options", [OPTIONS, {"budget": 64, "recent": 32, "interval": 32}], ids=["96", "64"])
def test_logits_and_blocks_are_those_of_a_plain_reference(make_engine: Any, options: dict[str, int]) -> None:
    ids = tokens(200)
    engine = make_engine(dtype="float32", plugins={"key_norm_eviction": options})
    lane = engine.lane_of(engine.default_plan)
    expected, held = reference_logits(lane.built.model, ids, **options)
    others = engine.lane_of(engine.plan({"key_norm_eviction": options, "span_attention": {}}))
    for case, step in ((lane, 37), (others, 1), (others, 90)):
        logits, left = engine_logits(case, ids, step)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert left[: len(held)] == held and 0 in held
    assert held != list(range(len(held))), "blocks between kept blocks are dropped"
    logits, _ = engine_logits(engine.lane_of(engine.plan({})), ids, 64)
    assert not torch.allclose(logits, expected, atol=1e-2), "the eviction changes the logits"


@pytest.mark.usefixtures("always_draft", "cut_tiny")
@pytest.mark.sizes("count", default=[4], sample=[20], whole=[20])
def test_answers_depend_on_no_chunk_batch_or_drafter(make_engine: Any, count: int) -> None:
    texts = prompts(count)
    bare = make_engine(plugins=SETTINGS)
    expected = [[bare.generate(text, params).token_ids for text in texts] for params in PARAMS]
    engine = make_engine(plugins={}, max_step_tokens=23)
    for name in DRAFTERS if count > 4 else ("lookahead",):
        plan = engine.plan({**SETTINGS, "span_attention": {}, name: DRAFTERS[name]})
        for params, answers in zip(PARAMS, expected, strict=True):
            results = engine.generate(texts, params, plan=plan)
            assert [result.token_ids for result in results] == answers, f"{name} {params}"
        assert sum(result.stats["draft_tokens"] for result in results) > 0
    full = engine.generate(texts[2], PARAMS[0], plan=engine.plan({}))
    assert full.token_ids != expected[0][2], "the eviction changes the answers"


def test_samples_and_preempted_sequences_give_the_same_answers(make_engine: Any) -> None:
    """A lane has 14 blocks; a sequence holds up to 8."""
    bare = make_engine(plugins=SETTINGS)
    texts = [tokens(140 + 30 * seed, seed) for seed in range(3)]
    expected = [bare.generate(text, PARAMS[0]).token_ids for text in texts]
    per_block = BLOCK_SIZE * bare.loader.needs.kv_per_token
    engine = make_engine(plugins=SETTINGS, kv_memory=4 * 14 * per_block, max_step_tokens=32)
    lane = engine.lane_of(engine.default_plan)
    assert (lane.pool.num_blocks, lane.pool.max_blocks) == (14, [8])
    assert [result.token_ids for result in engine.generate(texts, PARAMS[0])] == expected
    sampled = replace(PARAMS[1], n=2)
    samples = engine.generate(texts[0], sampled).samples
    alone = [bare.generate(texts[0], replace(PARAMS[1], sample_index=n)).token_ids for n in range(2)]
    assert [result.token_ids for result in samples] == alone
    engine.worker.call(lambda: None).result()
    assert_integrity(lane.pool, ())
    assert lane.pool.num_free_blocks == lane.pool.num_blocks


def test_a_sequence_holds_few_blocks_and_the_stats_name_the_dropped_tokens(make_engine: Any) -> None:
    engine = make_engine(plugins=SETTINGS)
    result = engine.generate(tokens(300), PARAMS[0])  # at the end, the KV of 339 tokens is computed
    notes = result.stats["notes"]["key_norm_eviction"]
    assert notes["dropped_tokens"] == 320 - 96 == sum(stop - start for start, stop in notes["dropped_runs"])
    assert notes["dropped_runs"][0][0] >= BLOCK and notes["dropped_runs"][-1][1] <= 320 - OPTIONS["recent"]
    held = result.stats["kv_bytes"] // (BLOCK * engine.loader.needs.kv_per_token)
    assert held == 96 // BLOCK + 1
    assert "key_norm_eviction dropped 224 tokens" in stats_line(result.stats)
    assert 'title="the model no longer sees 224 of 340 tokens">dropped <b>224</b>' in stats_html(result.stats, {})
    short = engine.generate(tokens(40), PARAMS[0])
    assert "key_norm_eviction" not in short.stats["notes"]


def test_the_longest_keys_go_first() -> None:
    policy = KeyNorms(128, 32, 64)
    assert policy.evicted({0: 9.0, 1: 1.0, 2: 3.0, 3: 2.0}) == []
    assert policy.evicted({0: 9.0, 1: 1.0, 4: 3.0, 5: 3.0, 7: 2.0, 8: 9.0}) == [4, 5]
    keys = torch.zeros(2, 1, 32, 4, dtype=torch.float64)
    keys[0, :, :, :2] = torch.tensor([3.0, 4.0])
    assert policy.score(keys) == 2.5
    assert evicts(policy) and BLOCK == BLOCK_SIZE
    assert not policy.starts(np.arange(9)).any()


def test_options_and_models_are_refused_with_the_reason(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    rounded = engine.plan({"key_norm_eviction": {"budget": 100, "recent": 33, "interval": 40}}).settings
    assert rounded["key_norm_eviction"] == {"budget": 128, "recent": 64, "interval": 64}
    with pytest.raises(BadOption, match="a budget of 64 tokens does not hold the first 32 and 64 recent tokens"):
        engine.plan({"key_norm_eviction": {"budget": 64, "recent": 64}})
    with pytest.raises(PlanConflict, match="key_norm_eviction cannot run with prefix_cache"):
        engine.plan({**SETTINGS, "prefix_cache": {}})
    monkeypatch.setattr(KeyNormEviction, "conflicts", ())
    with pytest.raises(PlanConflict, match="prefix_cache needs all blocks of a text, and key_norm_eviction drops"):
        engine.lane_of(engine.plan({**SETTINGS, "prefix_cache": {"save_documents": False}}))
    config = engine.loader.build_context.config

    def reason(**changes: Any) -> str | None:
        return KeyNormEviction.unavailable(BuildContext(replace(config, **changes), torch.float32, torch.device("cpu")))

    assert reason() is None
    assert "normalises its keys" in str(reason(qk_norm=True))
    assert "windows of their own" in str(reason(windows=(40,) * config.num_layers))


def test_layers_with_a_window_of_their_own_keep_their_blocks(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = presets.PRESETS["tiny"]
    mixed = replace(tiny, windows=(40, *[None] * (tiny.num_layers - 1)))
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny-mixed": mixed})
    bare = make_engine("random:tiny-mixed", plugins=SETTINGS)
    expected = [bare.generate(text, PARAMS[0]).token_ids for text in prompts(4)]
    engine = make_engine("random:tiny-mixed", plugins=SETTINGS | {"prompt_lookup": {}}, max_step_tokens=23)
    results = engine.generate(prompts(4), PARAMS[0])
    assert [result.token_ids for result in results] == expected
    assert results[2].stats["notes"]["key_norm_eviction"]["dropped_tokens"] > 0


def test_a_context_is_still_the_end_of_a_text(make_engine: Any) -> None:
    """The refusal of a long prompt names no plugin whose texts end at the context too."""
    engine = make_engine(context=256)
    assert "key_norm_eviction" not in engine.loader.way_past_context
    result = engine.generate(tokens(240), PARAMS[0], plan=engine.plan(SETTINGS))
    assert len(result.token_ids) == 16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("interval", 33, "interval is 33, and must be a multiple of 32"),
        ("interval", 0, "interval is 0"),
        ("budget", 0, "max_tokens is 64, and must hold the interval of 64 tokens and a block"),
    ],
)
def test_an_eviction_whose_numbers_do_not_fit_is_refused(name: str, value: int, message: str) -> None:
    policy: Any = replace(KeyNorms(128, 32, 64), **{name: value})
    with pytest.raises(ValueError, match=message):
        checked_eviction(policy, KVGroup((0,), 1, 32), BLOCK, 1000)
    with pytest.raises(ValueError, match="window of 40 tokens of its own cannot evict"):
        checked_eviction(KeyNorms(128, 32, 64), KVGroup((0,), 1, 32, 40), BLOCK, 1000)


class Wrong(KeyNorms):
    """Breaks the contract of an eviction in one of three ways."""

    way: ClassVar[str] = ""

    def evicted(self, scores: Any) -> list[int]:
        if self.way == "fails":
            raise RuntimeError("no idea")
        return [99] if self.way == "unknown" else []


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("fails", "RuntimeError: no idea"),
        ("unknown", r"evicted\(\) returned blocks \[99\]; the sequence holds blocks \[0, 1\]"),
        ("none", "left 192 tokens, and max_tokens 192 allows 128 after an eviction"),
    ],
)
def test_a_policy_that_fails_ends_its_request_and_is_named(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, way: str, message: str
) -> None:
    monkeypatch.setattr(Wrong, "way", way)

    class Careless(KeyNormEviction):
        name = "careless"

        @property
        def _policy(self) -> KeyNorms:
            return Wrong(128, 32, 64)

    registry = PluginRegistry.load()
    plugin: type[Plugin] = Careless
    registry.add(plugin)
    engine = make_engine(registry=registry)
    with pytest.raises(PluginFailed, match=f"careless.trim_cache.*{message}"):
        engine.generate(tokens(250), PARAMS[0], plan=engine.plan({"careless": {}}))
    assert len(engine.generate(tokens(250), PARAMS[0], plan=engine.plan(SETTINGS)).token_ids) == 40


def test_kernels_and_compiled_steps_give_the_same_bits(make_engine: Any) -> None:
    """In bfloat16, with the kernels in C: any chunks, and a runner that walks attention itself leaves the steps to the core."""
    engine = make_engine(dtype="bfloat16")
    names = ("flash_attention", "packed_linear", "fused_ops", "compiled_step")
    for name in names:
        reason = PluginRegistry.load().get(name).unavailable(engine.loader.build_context)
        if reason:
            pytest.skip(reason)
    kernels: dict[str, Any] = SETTINGS | {name: {} for name in names[:3]}
    expected = [result.token_ids for result in engine.generate(prompts(4), PARAMS[1], plan=engine.plan(kernels))]
    small = make_engine(dtype="bfloat16", plugins={}, max_step_tokens=23)
    for others in ({}, {"compiled_step": {}}, {"compiled_step": {}, "prompt_lookup": {}}):
        plan = small.plan(kernels | others)
        assert [result.token_ids for result in small.generate(prompts(4), PARAMS[1], plan=plan)] == expected, others
