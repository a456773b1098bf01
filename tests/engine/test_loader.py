"""Dtypes that are chosen when none is named, and what draft models are built with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pitlane import BuildContext
from pitlane.engine.loader import KERNELS, choose_dtype, is_small
from pitlane.engine.models.registry import resolve
from pitlane.kernels import attention, linear

CPU = torch.device("cpu")
SMALL, LARGE = resolve("random:tiny").config, resolve("random:llama-1b").config
here = pytest.mark.skipif(bool(linear.unavailable() or attention.unavailable(64)), reason="no kernels here")


def chosen(config: Any, wanted: tuple[str, ...]) -> torch.dtype:
    return choose_dtype(None, CPU, config, lambda context: {name: {} for name in wanted})


@pytest.mark.parametrize("fast", [False, True])
def test_a_small_model_is_in_bfloat16_only_by_all_kernels(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert is_small(SMALL) and not is_small(LARGE)
    quick = torch.bfloat16 if fast else torch.float32
    assert chosen(SMALL, KERNELS) == chosen(LARGE, KERNELS) == chosen(LARGE, ()) == quick
    for name in KERNELS:
        assert chosen(SMALL, tuple(other for other in KERNELS if other != name)) == torch.float32
    assert choose_dtype("float64", CPU, SMALL, lambda context: {}) == torch.float64


@here
def test_what_is_asked_for_decides(make_engine: Any) -> None:
    """A small model's dtype follows from the plugins that the engine is made with."""
    every = {name: {} for name in KERNELS}
    some = {"prefix_cache": {}}
    for plugins, dtype in (
        (None, torch.bfloat16),
        (every, torch.bfloat16),
        ({}, torch.float32),
        (some, torch.float32),
    ):
        assert make_engine("bundled", dtype=None, plugins=plugins).loader.dtype == dtype


@here
def test_a_draft_model_is_built_with_the_kernels_that_can_serve_it(make_engine: Any) -> None:
    from pitlane.kernels.linear import Packed
    from pitlane.plugins.paged_attention import Paged

    engine = make_engine("bundled", dtype="bfloat16", plugins=KERNELS)
    runner = engine.lane_of(engine.default_plan).open_drafter("bundled-drafter").runner
    assert isinstance(runner.attention, Paged)
    assert all(isinstance(layer.qkv, Packed) for layer in runner.model.layers)
    narrow = BuildContext(
        replace(SMALL, head_dim=24), torch.bfloat16, CPU
    )  # heads that the attention in C does not know
    assert engine.default_plan.for_drafter(narrow).names == ["fused_ops", "packed_linear"]
    assert engine.default_plan.for_drafter(BuildContext(SMALL, torch.float32, CPU)).names == []
