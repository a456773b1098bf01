"""awq, smoothquant, gptq, mixed and few_bits: factors keep the function, searches never lose, codes run as chosen, budgets hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane import BadOption, BuildContext, LinearPart, Member, PlanConflict, SamplingParams, parts_of
from pitlane.engine.calibration.walk import LayerWalk
from pitlane.engine.models import presets
from pitlane.engine.models.parts import NormPart
from pitlane.engine.models.presets import preset
from pitlane.engine.models.registry import resolve
from pitlane.kernels import linear as bfloat16_linear
from pitlane.kernels.packing import UNIT, unpack_groups, unpack_rows
from pitlane.kernels.quantize_math import quantize_linear
from pitlane.kernels.scaling import norm_factors, row_divisors, scaled, shared
from pitlane.plugins.few_bits import FewBits
from pitlane.plugins.mixed import Choice, Mixed, spend
from tests.engine.calibration.test_calibration import EVERY_SWITCH
from tests.engine.models.harness import CPU

FEW: dict[str, Any] = {"tokens": 256}
INT4: dict[str, Any] = {"group_size": 64, "symmetric": True}
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def opened(engine: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The lane of a plan, and the recipe that was made for it."""
    plan = engine.plan(settings)
    lane = engine.lane_of(plan)
    assert engine.generate([1, 2, 3], PARAMS, plan=plan).stats["failed"] == {}
    return lane, next(iter(plan.plugins))


def notes_of(home: Path, plugin: str) -> list[dict[str, Any]]:
    from pitlane import Recipe

    (folder,) = (home / "recipes").glob(f"{plugin}-*")
    return Recipe(folder).notes()


# ---- factors


def test_factors_between_a_part_and_its_feeder_keep_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's declaration `fed_by` holds for every switch: biases, head norms, norm offsets, grouped heads, windows."""
    config = replace(preset("tiny"), **EVERY_SWITCH)
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "rich": config})
    source, recipe = resolve("random:rich"), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(0)
    plain = LayerWalk(source, None)
    fed = [part for part in parts_of(config) if isinstance(part, LinearPart) and part.fed_by is not None]
    assert len(fed) == 4 * config.num_layers
    for part in fed:
        feed = part.fed_by
        assert feed is not None
        factors = shared(torch.rand(part.in_features, generator=generator) * 4 + 0.2, feed.groups, feed.repeats)
        if feed.is_norm:
            recipe[f"{feed.name}.norm"], factors = norm_factors(plain.weight(feed.name), factors, torch.float32)
        else:
            recipe[f"{feed.name}.rows"] = row_divisors(factors, feed.groups, feed.repeats)
        recipe |= {f"{member.name}.columns": factors for member in part.members}

    def transform(part: Any, tensors: Any) -> Any:
        changed = scaled(part.name, tensors, recipe.get, part.offset if isinstance(part, NormPart) else 0.0)
        return tensors if changed is None else changed

    ids = torch.arange(60).view(2, 30)
    with torch.inference_mode():
        outputs = []
        for walk in (plain, LayerWalk(source, transform)):
            hidden = walk.embed(ids)
            for layer in range(config.num_layers):
                hidden, stats = walk.gather(layer, hidden, False, lambda: None)
            outputs.append(hidden)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-3, rtol=1e-3)
    assert stats["model.layers.1.mlp.down_proj"].absmax.std() > 0  # the factors did change the inputs of linears


def test_a_rounded_norm_changes_no_function() -> None:
    norm, factors = torch.rand(64) + 0.5, torch.rand(64) * 3 + 0.1
    norm[3] = 0.0
    after, exact = norm_factors(norm, factors, torch.bfloat16)
    torch.testing.assert_close(after * exact, norm.bfloat16().float(), rtol=1e-6, atol=0)
    assert torch.equal(after.bfloat16().float(), after) and float(exact[3]) == 1.0
    torch.testing.assert_close(exact[4:], factors[4:], rtol=2**-7, atol=0)


# ---- awq, smoothquant


@pytest.mark.parametrize("options", [INT4, {"group_size": 32}], ids=["symmetric", "lows"])
def test_awq_never_ends_worse_than_round_to_nearest(make_engine: Any, own_home: Path, options: dict[str, Any]) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    opened(engine, {"int4": options, "awq": FEW})
    notes = [note for layer in notes_of(own_home, "awq") for note in layer.values()]
    assert len(notes) == 8 and any(note["error"] < note["start"] for note in notes)
    assert all(note["error"] <= note["start"] and note["after_clip"] <= note["before_clip"] for note in notes)


def test_awq_with_fewer_bits_puts_them_on_the_grid_of_int4_exactly(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    lane, _ = opened(engine, {"int4": INT4, "awq": {**FEW, "bits": 3}})
    linear = lane.built.model.layers[0].down
    numbers, _, _ = unpack_groups(linear.packed, linear.num_inputs, linear.form)
    assert {int(n) for n in numbers.unique()} <= set(range(0, 16, 2))  # 8 of 16 codes


def test_smoothquant_never_ends_worse_than_its_start(make_engine: Any, own_home: Path) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    opened(engine, {"int8": {}, "smoothquant": FEW})
    notes = [note for layer in notes_of(own_home, "smoothquant") for note in layer.values()]
    assert len(notes) == 8 and all(note["error"] <= note["start"] and note["outliers"] >= 1 for note in notes)


def test_a_recipe_belongs_to_the_options_of_the_plugin_that_rounds(make_engine: Any, own_home: Path) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    for options in (INT4, {"group_size": 32}, INT4):
        opened(engine, {"int4": options, "awq": FEW})
    assert len(list((own_home / "recipes").iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"awq": {}}, PlanConflict, "awq requires int4"),
        ({"smoothquant": {}}, PlanConflict, "smoothquant requires int8"),
        ({"int4": {}, "awq": {"bits": 3}}, BadOption, "awq.bits = 3 needs int4.symmetric = true"),
        ({"int8": {"activations": "bfloat16"}, "smoothquant": {}}, BadOption, "set int8.activations to int8"),
        ({"gptq": {"text": "/missing.txt"}}, BadOption, "'/missing.txt' cannot be read"),
        ({"mixed": {"bits": 3}}, BadOption, "mixed.bits = 3 is less than the smallest formats"),
        ({"few_bits": {}, "int4": {}}, PlanConflict, "few_bits"),
    ],
)
def test_what_cannot_work_is_refused(
    make_engine: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    with pytest.raises(error, match=words):
        engine.lane_of(engine.plan(settings))


def test_group_sizes_that_do_not_divide_are_refused(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(preset("tiny"), intermediate_size=224)
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "odd": config})
    engine = make_engine("random:odd", dtype="float32")
    for settings in ({"gptq": {"group_size": 64}}, {"few_bits": {"group_size": 64}}):
        with pytest.raises(BadOption, match=r"got 64 and 224 \(model.layers.0.mlp.down_proj\)"):
            engine.plan(settings)
    opened(engine, {"mixed": {**FEW, "bits": 6.0}})


# ---- gptq


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_runs_the_codes_of_its_recipe_and_beats_round_to_nearest(
    make_engine: Any, own_home: Path, symmetric: bool
) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    options = {**FEW, "group_size": 64, "symmetric": symmetric}
    lane, plugin = opened(engine, {"gptq": options})
    notes = [note for layer in notes_of(own_home, "gptq") for note in layer.values()]
    assert len(notes) == 8 and all(note["error"] < note["nearest"] for note in notes)
    (folder,) = (own_home / "recipes").iterdir()
    from pitlane import Recipe

    recipe, linear = Recipe(folder), lane.built.model.layers[1].down
    numbers, scales, lows = unpack_groups(linear.packed, linear.num_inputs, linear.form)
    name = "model.layers.1.mlp.down_proj"
    codes = recipe.get(f"{name}.codes")
    assert codes is not None and torch.equal(numbers.flatten(1), codes.float() + (8 if symmetric else 0))
    expected = recipe.get(f"{name}.scales")
    assert expected is not None and torch.equal(scales * UNIT, expected) and (lows is None) == symmetric
    same = engine.plan({"int4": {"group_size": 64, "symmetric": symmetric}})
    assert lane.weight_bytes == engine.lane_of(same).weight_bytes


def test_gptq_in_8_bits_runs_on_the_kernel_of_int8(make_engine: Any, own_home: Path) -> None:
    """With a scale per row: the bytes of int8, the codes of the recipe, and less error than int8."""
    engine = make_engine("random:tiny", dtype="bfloat16")
    lane, _ = opened(engine, {"gptq": {**FEW, "bits": 8, "group_size": 0}})
    notes = [note for layer in notes_of(own_home, "gptq") for note in layer.values()]
    assert len(notes) == 8 and all(note["error"] < note["nearest"] for note in notes)
    assert lane.weight_bytes == engine.lane_of(engine.plan({"int8": {}})).weight_bytes
    from pitlane import Recipe

    (folder,) = (own_home / "recipes").iterdir()
    linear, name = lane.built.model.layers[1].down, "model.layers.1.mlp.down_proj"
    codes, scales = Recipe(folder).get(f"{name}.codes"), Recipe(folder).get(f"{name}.scales")
    assert codes is not None and torch.equal(unpack_rows(linear.packed, linear.num_inputs)[: len(codes)], codes.float())
    assert scales is not None and torch.equal(linear.scales, scales[:, 0])


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (6, 64), (4, 0), (8, 64)])
def test_gptq_of_other_bits_runs(make_engine: Any, bits: int, group_size: int) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    options = {**FEW, "bits": bits, "group_size": group_size, "act_order": False, "clip": False}
    lane, _ = opened(engine, {"gptq": options})
    linear = lane.built.model.layers[0].down
    assert hasattr(linear, "packed") == (bits == 3)


@pytest.mark.skipif(bfloat16_linear.unavailable() is not None, reason=str(bfloat16_linear.unavailable()))
def test_gptq_on_the_kernel_gives_the_same_ids_in_any_batch(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16", plugins={"gptq": FEW, "flash_attention": {}, "fused_ops": {}})
    prompts = [[(7 * i + 3 * j) % 250 for j in range(20 + 9 * i)] for i in range(4)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
    assert [result.token_ids for result in engine.generate(prompts, params)] == alone


# ---- mixed


def test_the_budget_is_spent_where_the_error_falls_most() -> None:
    parts = [LinearPart((Member(name, 8),), 64) for name in ("a", "b", "c")]
    options = [Choice(4, 64), Choice(8, 0)]
    errors = {"a": (0.1, 0.0), "b": (0.5, 0.1), "c": (0.02, 0.03)}

    def error(part: LinearPart, choice: Choice) -> float:
        return errors[part.name][options.index(choice)]

    choices = dict.fromkeys(errors, options)
    bits = [[spend(parts, choices, error, budget)[name].bits for name in "abc"] for budget in (4.25, 5.7, 8.5)]
    assert bits == [[4, 4, 4], [4, 8, 4], [8, 8, 4]]  # c gains nothing from 8 bits


def test_mixed_keeps_its_budget_and_its_plan_of_bytes(make_engine: Any, own_home: Path) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    sizes = {}
    for bits in (4.25, 5.0, 8.1):
        lane, plugin = opened(engine, {"mixed": {**FEW, "bits": bits, "head": "bfloat16"}})
        layers = lane.built.model.layers
        linears = [x for layer in layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        weights = sum(x.num_outputs * x.num_inputs for x in linears)
        sizes[bits] = 8 * sum(x.packed.nbytes + (0 if x.scales is None else x.scales.nbytes) for x in linears) / weights
        assert sizes[bits] <= bits * 1.01
    assert len({round(size, 2) for size in sizes.values()}) == 3
    assert len(list((own_home / "recipes").iterdir())) == 1, "a recipe serves every budget"
    errors = [layer[name] for layer in notes_of(own_home, "mixed") for name in layer]
    assert all(note["8g0"] < note["4g64"] for note in errors)


def test_mixed_with_all_formats_runs_dense_parts(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16")
    lane, _ = opened(engine, {"mixed": {**FEW, "bits": 3.25, "formats": "all"}})
    layers = lane.built.model.layers
    kinds = {hasattr(x, "packed") for layer in layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)}
    assert False in kinds
    context = BuildContext(preset("tiny"), torch.bfloat16, CPU)
    part = next(part for part in parts_of(context.config) if isinstance(part, LinearPart) and part.fed_by)
    plan = Mixed().build_linear(part, context)
    assert plan is not None and plan.num_bytes > 0  # an estimate without a recipe
    with pytest.raises(BadOption, match="mixed has no recipe for this model yet"):
        plan.build([{"weight": torch.zeros(member.out_features, 128)} for member in part.members])


# ---- few_bits


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_few_bits_puts_weights_on_their_grid(bits: int) -> None:
    plugin = FewBits(FewBits.parse_options({"bits": str(bits), "group_size": "32"}))
    part = next(part for part in parts_of(preset("tiny")) if isinstance(part, LinearPart) and part.fed_by)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    changed = plugin.transform_weights(part, {"weight": weight})
    assert changed is not None
    assert torch.equal(changed["weight"], quantize_linear(weight, bits, 32).dequantized())
    distinct = max(len(group.unique()) for row in changed["weight"] for group in row.split(32))
    assert distinct <= 2**bits
    head = LinearPart((Member("lm_head", 64),), 128)
    assert plugin.transform_weights(head, {"weight": weight}) is None


def sample_ids(engine: Any) -> list[int]:
    """The tokens of the sample PDF."""
    from importlib.resources import files

    from pitlane import load_document

    pages = load_document(str(files("pitlane.storage.bundled") / "sample.pdf")).pages
    ids: list[int] = engine.tokenizer.encode("\n".join(page.text for page in pages), add_special_tokens=False)
    return ids


def test_gptq_in_8_bits_loses_less_than_int8(make_engine: Callable[..., Any]) -> None:
    """Same codes, same bytes, same kernel. On the bundled model in float32, with inputs that are not rounded."""
    from pitlane.ui.bench.quality import measure

    engine = make_engine("bundled", dtype="float32", plugins={})
    inputs = "activations=bfloat16"
    methods = [f"int8:{inputs}", f"gptq:bits=8,group_size=0,tokens=1024,{inputs}"]
    exact, nearest, gptq = measure(engine, sample_ids(engine), methods, 512, lambda done, total: None)
    assert 0 < gptq.kl < 0.55 * nearest.kl and gptq.weight_bytes == nearest.weight_bytes
    assert gptq.perplexity == pytest.approx(exact.perplexity, rel=0.01)


@pytest.mark.slow
def test_the_methods_come_in_their_published_order(make_engine: Callable[..., Any]) -> None:
    """On the bundled model and its sample PDF: round to nearest > awq > gptq, and the bounds of the docstrings."""
    from pitlane.ui.bench.quality import measure

    engine = make_engine("bundled", dtype="bfloat16", plugins=None)
    ids = sample_ids(engine)
    awq = "int4:group_size=64,symmetric=true+awq"
    three = ["few_bits:bits=3", f"{awq}:bits=3", "gptq:bits=3"]
    four = ["few_bits:bits=4", awq, "gptq", "int4", "mixed:bits=5", "int8+smoothquant"]
    _, *results = measure(engine, ids, three + four, 512, lambda done, total: None)
    moved = {result.method: result.moved for result in results}
    for methods in (three, four[:3], ["int4", "mixed:bits=5"]):
        values = [moved[method] for method in methods]
        assert values == sorted(values, reverse=True), moved
    bounds = {"few_bits:bits=3": 0.5, "few_bits:bits=4": 0.32, awq: 0.23, "gptq": 0.17, "mixed:bits=5": 0.16}
    assert all(moved[method] < bound for method, bound in bounds.items()), moved
    assert moved["int8+smoothquant"] < 0.06


@pytest.mark.slow
def test_smoothquant_rescues_a_model_with_outlier_channels(make_engine: Callable[..., Any], tmp_path: Path) -> None:
    """The same function as the bundled model; int8 with rounded inputs breaks it, and smoothing mends it."""
    from tests.plugins.outliers import compare, make

    bundled, outliers = (
        compare(make_engine(model, dtype="float32", plugins=None), 300)
        for model in ("bundled", str(make(tmp_path / "outliers")))
    )
    assert outliers[0].perplexity == pytest.approx(bundled[0].perplexity, rel=1e-3)
    _, broken, weights_only, smooth = outliers
    assert broken.kl > 10 * bundled[1].kl > 0
    assert smooth.kl < 0.1 * broken.kl and smooth.kl < weights_only.kl < broken.kl
