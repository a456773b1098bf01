"""The weights of a plan: refused or served by their own bytes, shared between lanes, draft models included."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pitlane import (
    BuildContext,
    LinearPart,
    LinearPlan,
    ModelTooLarge,
    Planner,
    Plugin,
    PluginFailed,
    SamplingParams,
    Tensors,
    hookimpl,
)
from pitlane.engine import variants
from pitlane.engine.kv.memory import RESERVE, Needs
from pitlane.engine.models.registry import resolve
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.variants import plan_weights
from pitlane.ui.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = "random:llama-1b-draft"  # 38.8 M parameters
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
KV = 4 * 32 * 2048  # a block for each of four lanes: 2 layers x 2 x 2 heads x 64 x 2 bytes per token


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Free memory between the needs of int8 weights and of bfloat16 weights."""
    free = 60_000_000 + RESERVE
    for module in ("kv.memory", "loader"):
        monkeypatch.setattr(f"pitlane.engine.{module}.available", lambda device: free)
    return free


@pytest.mark.usefixtures("little_memory")
def test_int8_serves_where_bfloat16_does_not_fit(make_engine: Any) -> None:
    with pytest.raises(ModelTooLarge, match=r"needs 74\.0 MiB for weights in bfloat16 .* 569\.2 MiB are free on cpu"):
        make_engine(MODEL, dtype="bfloat16", kv_memory=KV)
    engine = make_engine(MODEL, dtype="bfloat16", kv_memory=KV, plugins=["int8"])
    result = engine.generate([1, 2, 3], PARAMS)
    assert len(result.token_ids) == 4
    assert result.stats["weight_bytes"] == engine.loader.describe()["weight_bytes"] == pytest.approx(38.8e6, rel=0.01)
    assert "weights 37." in engine.loader.describe_memory()
    with pytest.raises(ModelTooLarge, match=r"needs 74\.0 MiB for weights"):
        engine.generate([1, 2, 3], PARAMS, plan=engine.plan({}))
    assert len(engine.generate([1, 2, 3], PARAMS).token_ids) == 4, "the refusal ends no other plan"


class Doubled(Plugin):
    """Takes twice the memory of the core."""

    name, role, exactness = "doubled", "linear", "identical"

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan:
        def build(tensors: list[Tensors]) -> Any:
            raise RuntimeError("no tensor fits")

        return LinearPlan(4 * part.num_values, 4 * part.num_values, build)


def test_a_plan_that_takes_more_is_refused_with_its_own_bytes(make_engine: Any, little_memory: int) -> None:
    registry = PluginRegistry.load()
    registry.add(Doubled)
    engine = make_engine(MODEL, dtype="bfloat16", kv_memory=KV, plugins=["int8"], registry=registry)
    with pytest.raises(ModelTooLarge, match=r"needs 1\d\d\.\d MiB for weights in bfloat16 with doubled"):
        engine.lane_of(engine.plan({"doubled": {}}))


def test_a_plan_whose_build_fails_names_the_plugin(make_engine: Any) -> None:
    registry = PluginRegistry.load()
    registry.add(Doubled)
    engine = make_engine(registry=registry)
    with pytest.raises(PluginFailed, match=r"doubled\.build_linear: RuntimeError: no tensor fits; take doubled out"):
        engine.lane_of(engine.plan({"doubled": {}}))


def test_a_hook_of_the_old_form_is_refused(make_engine: Any) -> None:
    class Old(Plugin):
        name, role, exactness = "old", "linear", "identical"

        @hookimpl
        def build_linear(self, part: LinearPart) -> Any:
            return torch.nn.Identity()

    registry = PluginRegistry.load()
    registry.add(Old)
    with pytest.raises(
        PluginFailed, match="old.build_linear: TypeError: returned Identity, must return a LinearPlan or None"
    ):
        make_engine(registry=registry, plugins=["old"])


class Unpacks(Plugin):
    """Needs much memory for a moment."""

    name, role, exactness = "unpacks", "linear", "identical"

    @hookimpl
    def build_linear(self, part: LinearPart) -> LinearPlan:
        return LinearPlan(10, 10**9, len)


def test_the_peak_counts_while_weights_load() -> None:
    """A part may need more memory while it is built than the whole model then needs."""
    registry = PluginRegistry.load(EXAMPLES)
    registry.add(Unpacks)
    context = BuildContext(resolve(MODEL).config, torch.bfloat16, torch.device("cpu"))
    peaks = []
    for settings in ({"unpacks": {}}, {"unpacks": {}, "magnitude_prune": {}}):
        weights = plan_weights(Planner(registry).resolve(settings), context)
        needs = Needs.of(weights)
        assert 10**9 < needs.peak < 1.1 * 10**9 and needs.weights < 10**8
        assert needs.total(1000) == needs.peak + RESERVE
        assert needs.total(2 * 10**9) == needs.weights + 2 * 10**9 + RESERVE
        peaks.append(needs.peak)
    head = 32000 * 512 * 2
    added = peaks[1] - peaks[0]
    assert head - 10_000 < added <= head, "a changed tensor is a copy beside the part that is built from it"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_command_shows_the_bytes_of_a_plan(make_engine: Any, dtype: str) -> None:
    def estimate(*args: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, ["memory", MODEL, "--dtype", dtype, "--json", *args])
        assert result.exit_code == 0, result.stderr
        estimate: dict[str, Any] = json.loads(result.stdout)
        return estimate

    core, int8 = estimate("--plugins", ""), estimate("--plugins", "int8")
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert 1 / size < int8["weight_bytes"] / core["weight_bytes"] < 1.02 / size
    assert core["weight_bytes"] == core["parameters"] * size == int8["parameters"] * size
    assert (core["weight_plugins"], int8["weight_plugins"]) == ([], ["int8"])
    assert estimate("--plugins", "+int8")["weight_bytes"] == int8["weight_bytes"]
    engine = make_engine(MODEL, dtype=dtype, plugins=["int8"])
    assert engine.generate([1], PARAMS).stats["weight_bytes"] == int8["weight_bytes"]
    text = CliRunner().invoke(main, ["memory", MODEL, "--plugins", "int8"]).stdout
    assert "by int8" in text
    refused = CliRunner().invoke(main, ["memory", MODEL, "--plugins", "no_such_plugin"])
    assert refused.exit_code == 2 and "unknown plugin" in refused.stderr


# ---- draft models


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose weights are read."""
    names: list[str] = []

    class Counted(variants.Variant):
        def __init__(self, plan: Plan, weights: Any, source: Any, context: Any) -> None:
            names.append(source.name)
            super().__init__(plan, weights, source, context)

    monkeypatch.setattr("pitlane.engine.loader.Variant", Counted)
    return names


def test_two_lanes_load_a_draft_model_once(make_engine: Any, loads: list[str], cut_tiny: str) -> None:
    engine = make_engine()
    draft = {"speculative": {"model": cut_tiny}}
    plans = [engine.plan(draft), engine.plan({"int8": {}, **draft})]
    lanes: list[Any] = []
    threads = [threading.Thread(target=lambda plan=plan: lanes.append(engine.lane_of(plan))) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads) == ["random:tiny", "random:tiny", cut_tiny]
    first, second = ([built.variant for built in lane.built_drafters] for lane in lanes)
    assert first == second and len(first) == 1
    core = engine.generate([1, 2, 3], PARAMS)
    drafted = engine.generate([1, 2, 3], PARAMS, plan=plans[0])
    assert drafted.token_ids == core.token_ids
    own = engine.loader.needs.weights
    assert drafted.stats["weight_bytes"] == own + first[0].num_bytes, "a lane counts its draft models"


def test_a_draft_model_of_the_same_weights_counts_once(make_engine: Any, loads: list[str]) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.plan({"speculative": {"model": "random:tiny"}}))
    assert loads == ["random:tiny"]
    assert lane.built_drafters[0].variant is lane.built.variant
    assert lane.weight_bytes == engine.loader.needs.weights


def test_a_draft_model_is_checked_for_fit(make_engine: Any, monkeypatch: pytest.MonkeyPatch, cut_tiny: str) -> None:
    engine = make_engine()
    monkeypatch.setattr("pitlane.engine.kv.memory.available", lambda device: RESERVE + 100_000)
    with pytest.raises(ModelTooLarge, match=rf"{cut_tiny} needs 2\.\d MiB for weights in float64"):
        engine.generate([1], PARAMS, plan=engine.plan({"speculative": {"model": cut_tiny}}))
    assert engine.generate([1], PARAMS).token_ids


def test_weights_go_with_their_last_lane(make_engine: Any) -> None:
    engine = make_engine(registry=PluginRegistry.load(EXAMPLES))
    for percent in range(6):
        engine.lane_of(engine.plan({"magnitude_prune": {"sparsity": percent / 100}}))
    gc.collect()
    assert len(engine.lanes.by_key) == len(engine.loader._variants) == 4
