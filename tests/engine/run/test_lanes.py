"""Several plans, variants and lanes at once: right tokens, no KV of another variant, failures that stay with their request."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import Any

import pytest
import torch

from pitlane import (
    BadOption,
    BuildContext,
    Draft,
    Limits,
    LinearPart,
    LinearPlan,
    Plugin,
    PluginFailed,
    PluginOptions,
    Rows,
    SamplingParams,
    Sequence,
    Tensors,
    hookimpl,
)
from pitlane.engine.plan.registry import PluginRegistry

PARAMS = SamplingParams(max_tokens=48, ignore_eos=True)


class Scaled:
    """x -> x @ (factor * W).T, the outputs of all members side by side."""

    def __init__(self, dtype: torch.dtype, factor: float, tensors: list[Tensors]) -> None:
        self.weight = torch.cat([member["weight"].to(dtype) * factor for member in tensors])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class OtherLinears(Plugin):
    """Makes another variant: the linears of the MLP have scaled weights."""

    name, role, exactness = "other_linears", "linear", "approximate"

    class Options(PluginOptions):
        factor: float = 0.5

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        size = part.num_values * context.dtype.itemsize
        build = partial(Scaled, context.dtype, self.options.factor)
        return LinearPlan(size, 3 * size, build) if "mlp" in part.name else None


class RepeatLast(Plugin):
    """A drafter that proposes the last token again and again, as a tree with two equal siblings."""

    name, role, exactness = "repeat_last", "drafter", "identical"

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        return [
            Draft([seq.token_ids[-1]] * min(4, limit), [-1, -1, 0, 1][:limit]) if limit else None
            for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)
        ]


class Breaks(Plugin):
    """A drafter that fails at its third call."""

    name, role, exactness = "breaks", "drafter", "identical"
    calls = 0

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> None:
        self.calls += 1
        if self.calls >= 3:
            raise RuntimeError("out of ideas")


class BreaksSteering(Plugin):
    """A steering plugin that fails."""

    name, exactness = "breaks_steering", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> torch.Tensor:
        raise RuntimeError("cannot steer")


class Forces(Plugin):
    """Steers to a fixed cycle of tokens, by position alone."""

    name, exactness = "forces", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> torch.Tensor:
        forced = torch.zeros_like(rows.logits)
        for i, index in enumerate(rows.seq_index):
            forced[i, (rows.seqs[index].num_tokens + len(rows.path(i))) % 5] = 1
        return forced


@pytest.fixture
def registry() -> PluginRegistry:
    registry = PluginRegistry.load()
    for plugin in (OtherLinears, RepeatLast, Breaks, BreaksSteering, Forces):
        registry.add(plugin)
    return registry


def prompt(seed: int, length: int = 40) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def test_two_variants_and_two_drafters_from_four_threads(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    settings: list[dict[str, Any]] = [
        {"prompt_lookup": {}, "prefix_cache": {}},
        {"repeat_last": {}, "prefix_cache": {}},
        {"other_linears": {}, "prompt_lookup": {}, "prefix_cache": {}},
        {"other_linears": {}, "repeat_last": {}, "prefix_cache": {}},
    ]
    alone = {}
    for variant in ({}, {"other_linears": {}}):
        with make_engine(registry=registry, plugins=variant) as single:
            alone[bool(variant)] = [single.generate(prompt(seed), PARAMS).token_ids for seed in range(6)]
    assert alone[False] != alone[True]
    answers: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        plan = engine.plan(settings[index])
        answers[index] = [engine.generate(prompt(seed), PARAMS, plan=plan).token_ids for seed in range(6)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(4)] == [alone[False], alone[False], alone[True], alone[True]]
    lanes = {id(engine.lane_of(engine.plan(plugins))) for plugins in settings}
    assert len(lanes) == 2, "plans that differ in step plugins share a lane"


def test_a_variant_never_uses_the_kv_of_another_variant(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    base, other = engine.plan({"prefix_cache": {}}), engine.plan({"prefix_cache": {}, "other_linears": {}})
    engine.generate(prompt(1, 100), PARAMS, plan=base)
    assert engine.generate(prompt(1, 100), PARAMS, plan=other).stats["cached_tokens"] == 0
    assert engine.generate(prompt(1, 100), PARAMS, plan=base).stats["cached_tokens"] > 0
    assert engine.lane_of(base).pool.fingerprint != engine.lane_of(other).pool.fingerprint
    stronger = engine.plan({"prefix_cache": {}, "other_linears": {"factor": 0.25}})
    assert engine.generate(prompt(1, 100), PARAMS, plan=stronger).stats["cached_tokens"] == 0


def test_a_toggle_in_the_middle_of_a_conversation_keeps_the_kv(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    first = engine.generate(prompt(1, 60), PARAMS, plan=engine.plan({"prefix_cache": {}}))
    turn = prompt(1, 60) + first.token_ids + prompt(2, 9)
    second = engine.generate(turn, PARAMS, plan=engine.plan({"prefix_cache": {}, "repeat_last": {}}))
    assert second.stats["cached_tokens"] == 60 + len(first.token_ids) - 1, "the last token has no KV"
    assert second.token_ids == engine.generate(turn, PARAMS, plan=engine.plan({})).token_ids


def test_kv_of_accepted_tree_nodes_moves_to_its_place(make_engine: Any, registry: PluginRegistry) -> None:
    """The steered cycle of tokens makes the engine accept later branches of the tree at times; no drafter changes a token."""
    engine = make_engine(registry=registry)
    expected = engine.generate(prompt(1), PARAMS, plan=engine.plan({"forces": {}})).token_ids
    assert expected == [(40 + i) % 5 for i in range(48)]
    for drafter in ("repeat_last", "prompt_lookup"):
        result = engine.generate(prompt(1), PARAMS, plan=engine.plan({"forces": {}, drafter: {}}))
        assert result.token_ids == expected
        if drafter == "prompt_lookup":
            assert result.stats["steps"] < 20


def test_a_failing_identical_plugin_is_taken_out(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    plain = engine.generate(prompt(1), PARAMS).token_ids
    result = engine.generate(prompt(1), PARAMS, plan=engine.plan({"breaks": {}}))
    assert result.token_ids == plain
    assert "out of ideas" in result.stats["failed"]["breaks"]
    assert result.stats["plugins"] == {}


def test_a_failing_steering_plugin_ends_only_its_own_request(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    beside = engine.submit(prompt(1), PARAMS)
    with pytest.raises(PluginFailed, match="breaks_steering.adjust_logits: RuntimeError: cannot steer"):
        engine.generate(prompt(2), PARAMS, plan=engine.plan({"breaks_steering": {}}))
    assert beside.result().token_ids == engine.generate(prompt(1), PARAMS).token_ids


def test_idle_lanes_make_room(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    for i in range(1, 7):
        engine.generate(prompt(1), PARAMS, plan=engine.plan({"other_linears": {"factor": 1 / i}}))
    assert len(engine.lanes.all) <= 4


def test_busy_lanes_are_not_dropped(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    long = SamplingParams(max_tokens=100_000, ignore_eos=True)
    plans = [engine.plan({})] + [engine.plan({"other_linears": {"factor": 1 / i}}) for i in range(2, 5)]
    for plan in plans:
        engine.lane_of(plan)
    streams = [engine.submit(prompt(1), long, plan=plan) for plan in plans]
    events = [iter(stream) for stream in streams]
    for stream_events in events:
        next(stream_events)
    fifth = engine.plan({"other_linears": {"factor": 0.9}})
    for ask in (lambda: engine.submit(prompt(1), PARAMS, plan=fifth).result(), lambda: engine.lane_of(fifth)):
        with pytest.raises(BadOption, match="4 lanes are busy"):
            ask()
    for stream in streams:
        stream.abort()
        assert stream.result().finish_reason == "aborted"


class WrongResults(Plugin):
    """Returns a wrong result from the hook that the option names."""

    name, role, exactness = "wrong_results", "drafter", "identical"

    class Options(PluginOptions):
        hook: str = "propose"

    @hookimpl
    def match_prefix(self, seq: Sequence) -> Any:
        return 7 if self.options.hook == "match_prefix" else None

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> Any:
        return {"propose": 5, "list": [[1, 2]] * len(seqs), "text": [Draft(["x"])] * len(seqs)}.get(  # type: ignore[list-item]
            self.options.hook
        )

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        return 5 if self.options.hook == "adjust_logits" else None


@pytest.mark.parametrize("hook", ["match_prefix", "propose", "list", "text", "adjust_logits"])
def test_a_wrong_result_of_a_hook_changes_no_answer(make_engine: Any, registry: PluginRegistry, hook: str) -> None:
    registry.add(WrongResults)
    engine = make_engine(registry=registry)
    beside = engine.submit(prompt(2), PARAMS)
    result = engine.generate(prompt(1), PARAMS, plan=engine.plan({"wrong_results": {"hook": hook}}))
    assert "wrong_results" in result.stats["failed"]
    assert result.token_ids == engine.generate(prompt(1), PARAMS).token_ids
    assert beside.result().token_ids == engine.generate(prompt(2), PARAMS).token_ids


class InPlace(Plugin):
    """Bans a token by writing into the logits in place."""

    name, exactness = "in_place", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> torch.Tensor:
        rows.logits[:, 7] = float("-inf")
        return rows.logits


def test_logits_may_be_changed_in_place(make_engine: Any, registry: PluginRegistry) -> None:
    registry.add(InPlace)
    engine = make_engine(registry=registry)
    assert 7 not in engine.generate(prompt(1), PARAMS, plan=engine.plan({"in_place": {}})).token_ids


def test_a_plugin_that_fails_while_a_lane_loads_does_not_hang(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(registry=registry)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    streams = [engine.submit(prompt(i), params, plan=engine.plan({"breaks": {}})) for i in range(3)]
    engine.generate(prompt(1), PARAMS, plan=engine.plan({"other_linears": {}}))
    assert all(len(stream.result().token_ids) == 200 for stream in streams)


@pytest.mark.parametrize("bad", [[10**6], [-1], ["a"], [1.5]])
def test_wrong_token_ids_are_refused(make_engine: Any, bad: list[Any]) -> None:
    with pytest.raises(BadOption, match="token id"):
        make_engine().submit([1, 2, *bad])
