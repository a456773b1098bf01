"""Plugins that come, go and fail while the engine runs: a toggle changes what it names, and no request suffers for another."""

from __future__ import annotations

import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pitlane import (
    BadOption,
    BuildContext,
    Draft,
    Lane,
    LinearPart,
    LinearPlan,
    PlainAttention,
    Plugin,
    PluginFailed,
    PluginOptions,
    PrefixMatch,
    PromptTooLong,
    SamplingParams,
    Sequence,
    hookimpl,
)
from pitlane.engine.models.presets import PRESETS
from pitlane.engine.pacing.governor import CALIBRATED
from pitlane.engine.plan.registry import PluginRegistry
from tests.integrity import assert_integrity

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
LONG = SamplingParams(max_tokens=5000, ignore_eos=True)
# Attention is called once per layer in two forwards to warm up, and in two for every size that drafts make.
CALLS_TO_OPEN = 2 * PRESETS["tiny"].num_layers * (1 + len(CALIBRATED))
PROMPT = [random.Random(0).randrange(256) for _ in range(100)]


def engine_with(make_engine: Any, *plugins: type[Plugin], **options: Any) -> Any:
    registry = PluginRegistry.load()
    for plugin in plugins:
        registry.add(plugin)
    return make_engine(registry=registry, **options)


# ---- instances and what outlives them


def test_forty_values_of_an_option_leave_no_threads_and_no_files(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    engine.generate(PROMPT, PARAMS)
    engine.lane_of(engine.default_plan).state["prefix_cache"].disk.submit(lambda: None).result()  # the store is open
    process = psutil.Process()
    num_threads, num_files = threading.active_count(), process.num_fds()
    for number in range(40):
        engine.generate(PROMPT, PARAMS, plan=engine.plan({"prefix_cache": {"disk_gb": 10 + number}}))
    deadline = time.monotonic() + 20
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= num_threads and process.num_fds() <= num_files + 2


def test_editing_an_option_forgets_no_cached_block(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache"])
    engine.generate(PROMPT, PARAMS)
    edited = engine.generate(PROMPT, PARAMS, plan=engine.plan({"prefix_cache": {"disk_gb": 11}}))
    assert edited.stats["cached_tokens"] == 99


def test_editing_an_option_forgets_no_earlier_answer(make_engine: Any) -> None:
    engine = make_engine(plugins={"prompt_lookup": {}})
    engine.generate(PROMPT, PARAMS)
    edited = engine.generate(PROMPT, PARAMS, plan=engine.plan({"prompt_lookup": {"max_ngram": 3}}))
    assert edited.stats["notes"]["prompt_lookup"]["replayed_tokens"] > 0


def test_blocks_of_a_plugin_that_is_switched_off_are_given_back(make_engine: Any) -> None:
    """A cache that no plan uses any more still holds blocks; requests without the plugin get them."""
    per_token = make_engine().loader.needs.kv_per_token
    engine = make_engine(plugins=(), kv_memory=4 * 32 * per_token * 6)
    cached = engine.plan({"prefix_cache": {}})
    engine.generate(PROMPT, PARAMS, plan=cached)
    pool = engine.lane_of(engine.plan({})).pool
    assert pool.num_free_blocks < 6
    del cached
    other = [token + 1 for token in PROMPT]
    assert len(engine.generate(other, SamplingParams(max_tokens=60, ignore_eos=True)).token_ids) == 60


# ---- who is paid


def test_only_a_drafter_proposes() -> None:
    class Second(Plugin):
        name, exactness = "second", "identical"

        @hookimpl
        def propose(self, seqs: Any) -> Any:
            return [Draft([1]) for _ in seqs]

    with pytest.raises(
        ValueError, match='second implements propose, which needs role = "drafter", and has role = None'
    ):
        PluginRegistry().add(Second)


@pytest.mark.parametrize(
    "role, hook", [("drafter", "propose"), ("attention", "build_attention"), ("linear", "build_linear")]
)
def test_a_role_needs_its_hook(role: Any, hook: str) -> None:
    wrong = type("Empty", (Plugin,), {"name": "empty", "role": role, "exactness": "identical"})
    with pytest.raises(ValueError, match=f'empty has role = "{role}" and must implement {hook}'):
        PluginRegistry().add(wrong)


def test_the_cache_that_answers_is_paid(make_engine: Any) -> None:
    class Silent(Plugin):
        """Asked first, knows nothing."""

        name, exactness, stage = "silent", "identical", -1

        @hookimpl
        def match_prefix(self, seq: Sequence, lane: Lane) -> PrefixMatch | None:
            return None

    engine = engine_with(make_engine, Silent, plugins=["silent", "prefix_cache"])
    engine.generate(PROMPT, PARAMS)
    bought = engine.generate(PROMPT, PARAMS).stats["bought_ms"]
    assert bought["silent"]["ms"] == 0 and bought["prefix_cache"]["ms"] > 0


# ---- a part of the forward fails


class Fragile(Plugin):
    """Builds one part that raises from its third call on: where = linear, op, attention or plan."""

    name, role, exactness = "fragile", "linear", "identical"

    class Options(PluginOptions):
        where: str = "linear"
        claims: str = "identical"
        num_good_calls: int = 40

    @classmethod
    def exactness_for(cls, options: Any) -> Any:
        return options.claims

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.num_calls = 0

    def count(self, where: str) -> None:
        if where == self.options.where:
            self.num_calls += 1
            if self.num_calls > self.options.num_good_calls:
                raise RuntimeError("the part broke")

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        if self.options.where != "linear" or "down" not in part.name:
            return None
        size = part.num_values * context.dtype.itemsize
        return LinearPlan(size, size, lambda tensors: FragileLinear(self, tensors[0]["weight"].to(context.dtype)))

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Any:
        if self.options.where != "op" or kind != "silu_mul":
            return None

        def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
            self.count("op")
            gate, up = gate_up.chunk(2, -1)
            return torch.nn.functional.silu(gate).mul_(up)

        return silu_mul


class FragileAttention(Plugin):
    name, role, exactness = "fragile_attention", "attention", "identical"

    class Options(PluginOptions):
        where: str = "attention"
        num_good_calls: int = 40

    @hookimpl
    def build_attention(self, context: BuildContext) -> Any:
        where, num_good_calls, calls = self.options.where, self.options.num_good_calls, [0]

        class Breaks(PlainAttention):
            def prepare(self, *arguments: Any) -> Any:
                calls[0] += where == "prepare"
                if where == "prepare" and calls[0] > 10:
                    raise RuntimeError("the part broke")
                return super().prepare(*arguments)

            def __call__(self, *arguments: Any) -> torch.Tensor:
                calls[0] += where == "attention"
                if calls[0] > num_good_calls:
                    raise RuntimeError("the part broke")
                return super().__call__(*arguments)

        return Breaks(context)


class FragileLinear:
    def __init__(self, plugin: Fragile, weight: torch.Tensor) -> None:
        self.plugin, self.weight = plugin, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.plugin.count("linear")
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"fragile": {"where": "linear"}},
        {"fragile": {"where": "linear", "claims": "rounding"}},
        {"fragile": {"where": "op"}},
        {"fragile_attention": {}},
        {"fragile_attention": {"where": "prepare"}},
        {"fragile_attention": {"num_good_calls": CALLS_TO_OPEN + 20}, "prefix_cache": {}, "prompt_lookup": {}},
    ],
    ids=str,
)
def test_requests_go_on_without_a_part_that_breaks(make_engine: Any, settings: dict[str, Any]) -> None:
    engine = engine_with(make_engine, Fragile, FragileAttention)
    prompts = [PROMPT[:length] for length in (5, 60, 100)]
    samplings = [PARAMS, SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, seed=3), PARAMS]
    expected = [engine.generate(p, s).token_ids for p, s in zip(prompts, samplings, strict=True)]
    broken = engine.plan(settings)
    engine.lane_of(broken)
    streams = [engine.submit(p, s, plan=broken) for p, s in zip(prompts, samplings, strict=True)]
    beside = engine.submit(PROMPT, PARAMS)
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    name = next(iter(settings))
    for result in results:
        assert result.stats["failed"] == {name: f"{name}.forward: RuntimeError: the part broke"}
        assert list(result.stats["plugins"]) == sorted(set(settings) - {name})
    assert beside.result().stats["failed"] == {}
    engine.worker.call(lambda: assert_integrity(engine.lane_of(broken).pool, ())).result()


def test_samples_of_a_request_move_together(make_engine: Any) -> None:
    engine = engine_with(make_engine, Fragile)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, seed=3, n=3)
    expected = [sample.token_ids for sample in engine.generate(PROMPT, sampling).samples]
    for _ in range(2):  # the part breaks after the prompt, then during the prompt
        result = engine.generate(PROMPT, sampling, plan=engine.plan({"fragile": {}}))
        assert [sample.token_ids for sample in result.samples] == expected


def test_an_approximate_part_that_breaks_ends_its_requests_with_its_name(make_engine: Any) -> None:
    engine = engine_with(make_engine, Fragile)
    broken = engine.plan({"fragile": {"claims": "approximate"}})
    streams = [engine.submit(PROMPT, PARAMS, plan=broken) for _ in range(2)]
    beside = engine.submit(PROMPT, PARAMS)
    for stream in streams:
        with pytest.raises(
            PluginFailed, match=r"fragile\.forward: RuntimeError: the part broke; take fragile out of the plan"
        ):
            stream.result()
    assert len(beside.result().token_ids) == 24


def test_a_part_that_breaks_at_once_is_refused_with_its_name(make_engine: Any) -> None:
    engine = engine_with(make_engine, Fragile)
    plan = engine.plan({"fragile": {"num_good_calls": 0}})
    message = r"fragile\.forward: RuntimeError: the part broke"
    with pytest.raises(PluginFailed, match=f"{message}; take fragile out of the plan"):
        engine.lane_of(plan)
    result = engine.generate(PROMPT, PARAMS, plan=plan)  # an identical plugin: the request goes on without it
    assert result.token_ids == engine.generate(PROMPT, PARAMS).token_ids
    assert re.match(message, result.stats["failed"]["fragile"])
    claiming = engine.plan({"fragile": {"num_good_calls": 0, "claims": "steering"}})
    with pytest.raises(PluginFailed, match=f"{message}; take fragile out of the plan"):
        engine.generate(PROMPT, PARAMS, plan=claiming)
    assert len(engine.generate(PROMPT, PARAMS).token_ids) == 24


# ---- loading


class Slow(Plugin):
    """Builds linears once its gate opens."""

    name, role, exactness = "slow", "linear", "identical"
    gate = threading.Event()
    asked = threading.Event()

    class Options(PluginOptions):
        number: int = 0
        error: str = ""

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> None:
        self.asked.set()
        assert self.gate.wait(60)
        if self.options.error:
            raise BadOption(self.options.error)


@pytest.fixture
def slow() -> Any:
    Slow.gate.clear()
    Slow.asked.clear()
    yield Slow
    Slow.gate.set()


def test_no_request_waits_for_the_load_of_another(make_engine: Any, slow: Any) -> None:
    engine = engine_with(make_engine, slow)
    expected = engine.generate(PROMPT, PARAMS).token_ids
    started = time.perf_counter()
    waiting = [engine.submit(PROMPT, PARAMS, plan=engine.plan({"slow": {}})) for _ in range(2)]
    assert slow.asked.wait(20)
    assert engine.generate(PROMPT, PARAMS).token_ids == expected, "the bare core's lane is open"
    drafted = engine.generate(PROMPT, PARAMS, plan=engine.plan({"jacobi": {}}))
    assert drafted.token_ids == expected, "a plan that is new to an open lane"
    assert time.perf_counter() - started < 30 and not engine.is_loaded(engine.plan({"slow": {}}))
    slow.gate.set()
    assert [stream.result().token_ids for stream in waiting] == [expected, expected]


def test_a_request_that_waits_for_a_load_can_be_aborted(make_engine: Any, slow: Any) -> None:
    engine = engine_with(make_engine, slow)
    stream = engine.submit(PROMPT, LONG, plan=engine.plan({"slow": {}}))
    assert slow.asked.wait(20)
    stream.abort()
    result = stream.result()
    assert (result.finish_reason, result.token_ids, result.stats["kv_bytes"]) == ("aborted", [], 0)
    slow.gate.set()
    assert len(engine.generate(PROMPT, PARAMS, plan=engine.plan({"slow": {}})).token_ids) == 24


def test_what_goes_wrong_in_a_load_reaches_the_requests_that_wait(make_engine: Any, slow: Any) -> None:
    slow.gate.set()
    engine = engine_with(make_engine, slow)
    plan = engine.plan({"slow": {"error": "no such device; take another"}})
    for _ in range(2):
        with pytest.raises(BadOption, match="no such device; take another"):
            engine.generate(PROMPT, PARAMS, plan=plan)
    with pytest.raises(BadOption, match="no such device; take another"):
        engine.lane_of(plan)
    with pytest.raises(PromptTooLong, match="the prompt has 5000 tokens"):
        engine.generate([1] * 5000, PARAMS, plan=engine.plan({"slow": {"number": 3}}))


def test_an_engine_closes_while_a_lane_loads(make_engine: Any, slow: Any) -> None:
    engine = engine_with(make_engine, slow)
    stream = engine.submit(PROMPT, PARAMS, plan=engine.plan({"slow": {}}))
    assert slow.asked.wait(20)
    engine.close()
    assert stream.result().finish_reason == "aborted"


def test_a_toggle_on_the_command_line_removes_what_it_names(tmp_path: Path) -> None:
    from pitlane.ui.plugin_text import parse_settings

    registry = PluginRegistry.load()
    default = registry.default_settings()
    for name in default:
        settings = parse_settings(f"-{name}", (), default, registry).settings
        assert settings == {other: options for other, options in default.items() if other != name}
