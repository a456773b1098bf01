"""Calibration: the walk is the model, the statistics are those of its inputs, recipes are made once and go on after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from pitlane import (
    BadOption,
    BuildContext,
    Engine,
    EngineClosed,
    LayerInputs,
    LayerRecipe,
    PitlaneError,
    Plugin,
    PluginFailed,
    PluginOptions,
    PluginRegistry,
    SamplingParams,
    hookimpl,
)
from pitlane.engine.calibration.calibrator import ModelCalibrator
from pitlane.engine.calibration.inputs import InputGatherer
from pitlane.engine.calibration.text import calibration_hash, calibration_text
from pitlane.engine.calibration.walk import LayerWalk
from pitlane.engine.models import presets
from pitlane.engine.models.presets import preset
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weights import RandomWeights
from pitlane.engine.plan.plan import Plan
from tests.engine.models.harness import CPU, Harness, load

EVERY_SWITCH = {
    "norm_offset": 1.0,
    "output_norms": True,
    "activation": "gelu_tanh",
    "embedding_multiplier": 2.0,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "windows": (8, None),
    "no_rope_layers": frozenset({1}),
}


def idle() -> None:
    pass


@pytest.fixture
def rich(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model with every switch of a decoder on."""
    config = replace(preset("tiny"), **EVERY_SWITCH)
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "rich": config})
    return "random:rich"


# ---- the walk


@pytest.mark.parametrize("model", ["random:tiny", "rich", "bundled"])
def test_the_walk_gives_the_logits_of_the_model(model: str, request: pytest.FixtureRequest) -> None:
    name = request.getfixturevalue("rich") if model == "rich" else model
    source = resolve(name)
    ids = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        walk = LayerWalk(source, None)
        hidden = walk.embed(ids)
        for index in range(source.config.num_layers):
            down = f"model.layers.{index}.mlp.down_proj"
            again = walk.run_with(index, hidden, {down: walk.weight(down)}, idle)
            hidden, _ = walk.gather(index, hidden, False, idle)
            torch.testing.assert_close(again, hidden, atol=1e-4, rtol=1e-4)
        built = load(name)
        normed = F.rms_norm(hidden, hidden.shape[-1:], built.norm, source.config.rms_norm_eps)
        logits = built.head(normed.flatten(0, 1)).view(2, 40, -1)
    expected = Harness(built, 2, 64).run({0: ids[0].tolist(), 1: ids[1].tolist()}).view(2, 40, -1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_statistics_are_those_of_the_inputs() -> None:
    source = resolve("random:tiny")
    ids = torch.arange(60).view(3, 20)
    with torch.inference_mode():
        walk = LayerWalk(source, None)
        hidden = walk.embed(ids)
        _, stats = walk.gather(0, hidden, True, idle)
        at = "model.layers.0."
        x = F.rms_norm(hidden, hidden.shape[-1:], walk.weight(at + "input_layernorm"), source.config.rms_norm_eps)
    assert list(stats) == [at + f"self_attn.{name}_proj" for name in "qo"] + [
        at + "mlp.gate_proj",
        at + "mlp.down_proj",
    ]
    x, first = x.flatten(0, 1), stats[at + "self_attn.q_proj"]
    assert first.num_tokens == 60 and first.hessian is not None
    torch.testing.assert_close(first.absmax, x.abs().amax(0))
    torch.testing.assert_close(first.mean_square, x.square().mean(0))
    torch.testing.assert_close(first.hessian, x.T @ x, atol=1e-3, rtol=1e-4)
    assert len(first.sample) == 3 * 20 and first.sample.shape[1] == 128


def test_a_gatherer_keeps_sums_and_few_rows() -> None:
    gatherer = InputGatherer(lambda x: x, 32, True)
    for _ in range(5):
        gatherer(torch.randn(512, 32))
    stats = gatherer.stats()
    assert stats.num_tokens == 2560 and len(stats.sample) == 5 * 16


# ---- recipes


class Maker(Plugin):
    """Makes recipes of sums; stops at layer `fails_at`."""

    name, exactness, stage = "maker", "approximate", 10

    class Options(PluginOptions):
        text: str = ""
        tokens: int = 256

    fails_at: int | None = None

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.visited: list[int] = []

    def visit(self, layer: LayerInputs) -> LayerRecipe:
        if layer.index == self.fails_at:
            raise KeyboardInterrupt
        self.visited.append(layer.index)
        name = layer.linears[0].members[0].name
        stats, weight = layer.stats[name], layer.weight(name)
        return LayerRecipe({f"{name}.sum": stats.mean_square}, {"index": layer.index}, {name: weight.round(decimals=1)})


def calibrator(home: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ModelCalibrator:
    monkeypatch.setenv("PITLANE_HOME", str(home))
    source = resolve("bundled")
    context = BuildContext(source.config, torch.bfloat16, CPU, source.stored_name, source.weights.fingerprint)
    return ModelCalibrator(source, Plan((), {}), context, **options)


def test_a_recipe_is_made_once_and_its_files_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, maker = calibrator(tmp_path, monkeypatch), Maker()
    assert calibration.recipe(maker) is None
    recipe = calibration.build(maker, maker.visit)
    assert maker.visited == list(range(8)) and recipe.notes() == [{"index": i} for i in range(8)]
    assert recipe.folder.parent == tmp_path / "recipes" and recipe.folder.stat().st_mode & 0o077 == 0
    assert not list(recipe.folder.glob("hidden-*")) and not list(recipe.folder.glob(".*"))
    again = calibrator(tmp_path, monkeypatch).build(maker, maker.visit)
    assert maker.visited == list(range(8))
    name = "model.layers.3.self_attn.q_proj"
    first, second = recipe.get(f"{name}.sum"), again.get(f"{name}.sum")
    assert first is not None and second is not None and torch.equal(first, second)
    assert recipe.get(f"{name}.other") is None and recipe.num_bytes > 8 * 4 * 256


def test_a_killed_build_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrator(tmp_path / "a", monkeypatch).build(maker := Maker(), maker.visit)
    killed = Maker()
    killed.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        calibrator(tmp_path / "b", monkeypatch).build(killed, killed.visit)
    assert calibrator(tmp_path / "b", monkeypatch).recipe(killed) is None
    (state,) = (tmp_path / "b" / "recipes").rglob("hidden-*")
    resumed = Maker()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        for process in (ended.pid, running.pid):
            for name in (state.name, "layer-003.safetensors", "recipe.json"):
                (state.parent / f".{name}.{process}").write_bytes(b"half a file")
        for name, age in ((".tmpOld", 7200), (".tmpNew", 0)):
            (state.parent / name).write_bytes(b"half a file")
            os.utime(state.parent / name, (time.time() - age, time.time() - age))
        recipe = calibrator(tmp_path / "b", monkeypatch).build(resumed, resumed.visit)
        running.communicate(b"\n")
    suffixes = {file.suffix or file.name for file in recipe.folder.glob(".*")}
    assert suffixes == {f".{running.pid}", ".tmpNew"}, "a running process keeps its files"
    assert killed.visited == [0, 1, 2] and resumed.visited == [3, 4, 5, 6, 7]
    assert recipe.name == whole.name and recipe.notes() == whole.notes()
    for file in sorted(whole.folder.glob("*.safetensors")):
        assert (recipe.folder / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_state_starts_earlier_and_a_damaged_recipe_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Maker()
    killed.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        calibrator(tmp_path, monkeypatch).build(killed, killed.visit)
    (state,) = (tmp_path / "recipes").rglob("hidden-*")
    state.write_bytes(state.read_bytes()[:1000])
    again = Maker()
    recipe = calibrator(tmp_path, monkeypatch).build(again, again.visit)
    assert again.visited == list(range(8))
    (recipe.folder / "layer-003.safetensors").write_bytes(b"no tensors")
    broken = calibrator(tmp_path, monkeypatch).recipe(again)
    assert broken is not None
    with pytest.raises(PitlaneError, match="is damaged .* delete this folder"):
        broken.get("model.layers.3.self_attn.q_proj.sum")


def test_closing_the_engine_ends_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    stopping = calibrator(tmp_path, monkeypatch, is_stopped=lambda: len(maker.visited) == 2)
    with pytest.raises(EngineClosed, match="maker: its recipe is half built"):
        stopping.build(maker, maker.visit)
    calibrator(tmp_path, monkeypatch).build(maker, maker.visit)
    assert maker.visited == [0, 1, *range(1, 8)]  # it stopped in layer 1, before the layer's outputs


def test_a_recipe_depends_on_model_text_options_and_earlier_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Any], make_adapter: Callable[..., Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 300)

    def folder(model: str = "random:tiny", plugins: Any = (), **options: Any) -> Path:
        engine = make_engine(model, dtype="float32")
        plan = engine.plan(dict(plugins))
        maker = Maker(Maker.parse_options(options))
        return ModelCalibrator(engine.loader.source, plan, engine.loader.build_context)._folder(maker, "")

    lora = {"lora": {"adapter": str(make_adapter())}}
    folders = [
        folder(),
        folder(tokens=128),
        folder(text=str(text)),
        folder(plugins=lora),
        folder("bundled"),
    ]
    assert len(set(folders)) == 5 and folder() == folders[0]
    text.write_text("other " * 300)
    assert folder(text=str(text)) != folders[2]


class Preparing(Plugin):
    """Changes weights, and fails or notes a call in `prepare`."""

    name, exactness = "preparing", "approximate"
    calls: ClassVar[list[Any]] = []

    class Options(PluginOptions):
        fails: bool = False

    def prepare(self, context: BuildContext) -> None:
        if self.options.fails:
            raise ValueError("no recipe")
        self.calls.append((dict(context.settings), context.calibrator is not None))

    @hookimpl
    def transform_weights(self, part: Any, tensors: Any, context: BuildContext) -> None:
        assert self.calls and context.calibrator is not None


def test_prepare_is_called_before_weights_are_read_and_a_failure_names_the_plugin() -> None:
    registry = PluginRegistry()
    registry.add(Preparing)
    with Engine("random:tiny", dtype="float32", plugins={}, registry=registry) as engine:
        for settings in ({"preparing": {}}, {"preparing": {}}, {}):
            assert engine.generate([1, 2, 3], SamplingParams(max_tokens=1), plan=engine.plan(settings)).token_ids
        assert Preparing.calls == [({"preparing": {"fails": False}}, True)]
        with pytest.raises(PluginFailed, match=r"preparing.prepare: ValueError: no recipe; take preparing out"):
            engine.lane_of(engine.plan({"preparing": {"fails": True}}))


def test_texts(tmp_path: Path) -> None:
    assert len(calibration_text("")) > 50_000 and calibration_hash("") != calibration_hash(__file__)
    with pytest.raises(BadOption, match="name a file of plain UTF-8 text"):
        calibration_text(str(tmp_path / "missing.txt"))
    short = tmp_path / "short.txt"
    short.write_text("ab")
    source = ModelSource("tiny", preset("tiny"), RandomWeights(preset("tiny")))
    context = BuildContext(source.config, torch.float32, CPU)
    maker = Maker(Maker.parse_options({"text": str(short)}))
    with pytest.raises(BadOption, match="at least 16 tokens, got 2"):
        ModelCalibrator(source, Plan((), {}), context).build(maker, maker.visit)


@pytest.mark.slow
def test_memory_is_bounded_by_a_layer(tmp_path: Path) -> None:
    """GPTQ on the first layer of a model of 1.1 billion parameters: 2.2 GB in bfloat16, 4.4 GB in float32.

    All layers have one shape. More tokens take more memory for the hidden states alone: 134 MB with 8,192 tokens.
    """
    code = """
import resource
from pitlane import EngineClosed, Engine
from pitlane.engine.calibration.calibrator import ModelCalibrator
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.plan import Plan
from pitlane.plugins.gptq import Gptq
import torch
source = resolve("random:llama-1b")
plugin, layers = Gptq(Gptq.parse_options({'tokens': 1024})), []
def visit(layer):
    layers.append(layer.index)
    return plugin._visit(layer)
context = BuildContext(source.config, torch.bfloat16, torch.device("cpu"), source.stored_name, source.weights.fingerprint)
try:
    ModelCalibrator(source, Plan((), {}), context, lambda: len(layers) == 1).build(plugin, visit, hessians=True)
except EngineClosed:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2 * 10**9 - 134 * 10**6
