"""Methods with a recipe: the files hold the codes that gptq chose, and the weights that awq scaled and clipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pitlane import LinearPart, PluginRegistry, parts_of
from pitlane.engine.models.registry import resolve
from pitlane.export.errors import ExportError
from pitlane.export.layouts import Settings, plugins_of
from pitlane.export.quantize import Weights, is_quantized, quantize, rounded
from pitlane.formats import calibrated
from pitlane.kernels.quantize_math import Codes
from tests.export.test_quantize import opened

GPTQ = Settings("gptq", 4, 64, True, "gptq")
AWQ = Settings("awq", 4, 32, False, "awq")


def made(settings: Settings) -> dict[str, dict[str, object]]:
    """The plugins of a method, with a short calibration."""
    plugins = plugins_of(settings)
    plugins[settings.method]["tokens"] = 256
    return plugins


@pytest.mark.parametrize("settings", [GPTQ, AWQ], ids=["gptq", "awq"])
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
    assert len(differing) - len(norms) == 14, "the method chose other weights than the nearest"
    assert bool(norms) == (settings is AWQ), "awq folds its scales into norms"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings("gptq", 4, 0), "gptq needs groups of 32, 64 or 128, got 0"),
        (Settings("awq", 8, 64), "awq makes 4 bits, or 2 and 3 symmetric bits, got 8"),
        (Settings("awq", 3, 64, symmetric=False), "awq makes 4 bits"),
    ],
)
def test_grids_that_a_method_does_not_have(settings: Settings, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        plugins_of(settings)
    assert plugins_of(Settings("rtn", 5, 16)) == {}
