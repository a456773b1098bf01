"""The dtype of a model, toggles that change nothing else, and the plugins that build draft models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pitlane import BuildContext
from pitlane.engine.choices import choose_dtype
from pitlane.engine.models.registry import resolve
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.kernels import attention, linear

CPU = torch.device("cpu")
KERNELS = ("packed_linear", "flash_attention", "fused_ops")
SMALL = resolve("random:tiny").config
here = pytest.mark.skipif(bool(linear.unavailable() or attention.unavailable(64)), reason="no kernels here")


@pytest.mark.parametrize("in_hardware, has_kernels", [(False, False), (True, False), (False, True)])
def test_the_dtype_follows_from_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, in_hardware: bool, has_kernels: bool
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: in_hardware)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for kernels in (linear, attention):
        monkeypatch.setattr(kernels, "unavailable", lambda *_: None if has_kernels else "no kernels")
    plugins = PluginRegistry.load()
    expected = torch.bfloat16 if in_hardware or has_kernels else torch.float32
    assert choose_dtype(None, CPU, SMALL, plugins) == expected
    assert choose_dtype(None, CPU, SMALL, None) == (torch.bfloat16 if in_hardware else torch.float32)
    assert choose_dtype("float64", CPU, SMALL, plugins) == torch.float64


@here
@pytest.mark.parametrize("absent", ["prefix_cache", *KERNELS, None])
def test_taking_a_plugin_out_changes_nothing_else(make_engine: Any, absent: str | None) -> None:
    """Neither the dtype nor any other plugin: so the difference between two runs is the plugin's."""
    whole = make_engine("bundled", dtype=None, plugins=None)
    rest = {name: options for name, options in whole.default_plan.settings.items() if name != absent}
    engine = make_engine("bundled", dtype=None, plugins=rest)
    assert engine.loader.dtype == whole.loader.dtype and engine.default_plan.settings == rest
    assert engine.lane_of(engine.default_plan).built.is_batch_invariant == (absent not in KERNELS)


@here
def test_a_draft_model_is_built_with_the_kernels_that_can_serve_it(make_engine: Any) -> None:
    from pitlane.kernels.linear import Packed
    from pitlane.plugins.flash_attention import Paged

    engine = make_engine("bundled", dtype="bfloat16", plugins=KERNELS)
    runner = engine.lane_of(engine.default_plan).open_drafter("bundled-drafter").runner
    assert isinstance(runner.forward.attention, Paged)
    assert all(isinstance(layer.qkv, Packed) for layer in runner.forward.model.layers)
    narrow = BuildContext(
        replace(SMALL, head_dim=24), torch.bfloat16, CPU
    )  # heads that the attention in C does not know
    assert engine.default_plan.for_drafter(narrow).names == ["fused_ops", "packed_linear"]
    assert engine.default_plan.for_drafter(BuildContext(SMALL, torch.float32, CPU)).names == []
