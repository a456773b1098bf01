"""Methods with a recipe: the files hold the codes that gptq and mixed chose, and the weights that awq and smoothquant scaled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pitlane import LinearPart, PluginRegistry, parts_of
from pitlane.engine.models.registry import resolve
from pitlane.export.errors import ExportError
from pitlane.export.quantize import Weights, is_quantized, quantize, rounded
from pitlane.export.settings import Settings, plugins_of
from pitlane.formats import calibrated
from pitlane.kernels.quantize_math import Codes
from tests.export.test_quantize import opened

GPTQ = Settings("gptq", 4, 64, True, "gptq")
AWQ = Settings("awq", 4, 32, False, "awq")
SMOOTH = Settings("smoothquant", 8, 0)
MIXED = Settings("mixed", budget=5.0)


def made(settings: Settings) -> dict[str, dict[str, object]]:
    """The plugins of a method, with a short calibration."""
    plugins = plugins_of(settings)
    plugins[settings.method]["tokens"] = 256
    return plugins


@pytest.mark.parametrize("settings", [GPTQ, AWQ, SMOOTH], ids=["gptq", "awq", "smoothquant"])
def test_the_files_hold_what_the_method_chose(settings: Settings, tmp_path: Path) -> None:
    source = resolve("random:tiny")
    recipe = calibrated(source, made(settings), PluginRegistry.load())
    with torch.inference_mode():
        quantize(source, settings, tmp_path / "out", lambda done: None, calibrated=recipe)
    written, weights = opened(tmp_path / "out"), Weights(source, recipe)
    differing = []
    for part in parts_of(source.config):
        if not isinstance(part, LinearPart) or not is_quantized(part):
            for name, tensor in weights.tensors(part).items():
                assert torch.equal(written.weights.get(name), tensor), name
                if not torch.equal(tensor, source.weights.get(name)):
                    differing.append(name)
            continue
        for member in part.members:
            name = f"{member.name}.weight"
            if settings is GPTQ:
                stored = [recipe.recipes["gptq"].get(f"{member.name}.{last}") for last in ("codes", "scales", "zeros")]
                expected = Codes(*stored).dequantized()  # type: ignore[arg-type]
            else:
                weight = weights.tensors(part.alone(member))[name]
                expected = rounded(name, weight, settings, torch.bfloat16).dequantized()
            assert torch.equal(written.weights.get(name), expected.bfloat16()), name
            nearest = rounded(name, source.weights.get(name), settings, torch.bfloat16).dequantized()
            if not torch.equal(expected, nearest):
                differing.append(name)
    norms = [name for name in differing if "norm" in name]
    least = 1 if settings is SMOOTH else 14  # smoothquant leaves a linear as it is if scales do not help
    assert least <= len(differing) - len(norms) <= 14, "the method chose other weights than the nearest"
    assert bool(norms) == (settings is not GPTQ), "awq and smoothquant fold their scales into norms"


@pytest.mark.parametrize("budget", [5.0, 3.5])
def test_the_files_hold_the_bits_that_mixed_chose(budget: float, tmp_path: Path) -> None:
    """The config has a group of linears for every number of bits, and the mean of all linears stays within the budget."""
    source, settings = resolve("random:tiny"), replace(MIXED, budget=budget)
    recipe = calibrated(source, made(settings), PluginRegistry.load())
    with torch.inference_mode():
        quantize(source, settings, tmp_path / "out", lambda done: None, calibrated=recipe)
    written, bits, count = opened(tmp_path / "out"), 0.0, 0
    for part in filter(is_quantized, parts_of(source.config)):
        for member in part.members:
            rounding, packing = recipe.roundings[member.name], written.packings[member.name]
            name = f"{member.name}.weight"
            weight = source.weights.get(name)
            size = rounding.grid[1] or part.in_features
            assert (packing.bits, packing.group_size, packing.symmetric) == (rounding.grid[0], size, True)
            # The scales of the file are bfloat16; the codes are the nearest codes with these scales.
            scales = rounding.codes(weight.float()).scales.bfloat16().float().repeat_interleave(size, 1)
            half = 2 ** (packing.bits - 1)
            codes = (weight.float() / scales).round().clamp(-127 if packing.bits == 8 else -half, half - 1)
            assert torch.equal(written.weights.get(name), (codes * scales).bfloat16()), name
            bits += (packing.bits + 16 / size) * weight.numel()
            count += weight.numel()
    assert len({packing.bits for packing in written.packings.values()}) > 1, "linears have different bits"
    assert budget - 0.6 < bits / count <= budget


def test_mixed_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="mixed needs a recipe that covers model.layers.0"):
        quantize(resolve("random:tiny"), MIXED, tmp_path / "out", lambda done: None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings("gptq", 4, 0), "gptq needs groups of 32, 64 or 128, got 0"),
        (Settings("awq", 8, 64), "awq makes 4 bits, or 2 and 3 symmetric bits, got 8"),
        (Settings("awq", 3, 64, symmetric=False), "awq makes 4 bits"),
        (Settings("smoothquant", 4, 0), "smoothquant has 8 bits, got 4; leave --bits out"),
        (Settings("smoothquant", 8, 64), "smoothquant has no groups of inputs, got 64"),
        (Settings("smoothquant", 8, 0, symmetric=False), "smoothquant has no zero points"),
        (
            Settings("mixed", format="gptq", budget=5.0),
            "gptq holds no linears of different bits; choose --format compressed",
        ),
        (Settings("fp8", 8, 0, format="awq", granularity="block"), "awq holds no float8; choose --format compressed"),
        (Settings("fp8", 8, 0, granularity="row"), "the granularity of fp8 must be tensor, channel, block, got 'row'"),
    ],
)
def test_grids_that_a_method_does_not_have(settings: Settings, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        plugins_of(settings)
    assert plugins_of(Settings("rtn", 5, 16)) == {}
