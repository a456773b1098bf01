"""packed_checkpoint in an engine: its notes and bytes, toggles, plugins that change weights, equal ids in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.export.settings import Settings
from pitlane.kernels.quantized import Quantized
from tests.export.test_quantize import write

PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPT = [5, 9, 200, 41, 77, 8] * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(Settings(bits=4, group_size=32), tmp_path / "int4")
    return tmp_path / "int4"


def test_it_is_on_by_default_and_says_what_runs_how(folder: Path, make_engine: Callable[..., Any]) -> None:
    engine = make_engine(str(folder), dtype="bfloat16", plugins=None)
    result = engine.generate(PROMPT, PARAMS)
    assert "packed_checkpoint" in engine.default_plan.names and "packed_linear" not in engine.default_plan.names
    assert result.stats["notes"]["packed_checkpoint"] == {"4 bits, groups of 32: kernel": 14}
    assert result.stats["exactness"] == "rounding" and result.stats["failed"] == {}
    plain = engine.generate(PROMPT, PARAMS, plan=engine.plan({}))
    assert result.stats["weight_bytes"] < 0.6 * plain.stats["weight_bytes"]
    layer = engine.lane_of(engine.default_plan).built.model.layers[0]
    assert {type(linear) for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)} == {Quantized}


def test_rounded_inputs_are_approximate(folder: Path, make_engine: Callable[..., Any]) -> None:
    engine = make_engine(str(folder), dtype="bfloat16", plugins={"packed_checkpoint": {"activations": "int8"}})
    assert engine.generate(PROMPT, PARAMS).stats["exactness"] == "approximate"
    assert engine.lane_of(engine.default_plan).built.model.layers[0].down.form.quantized


def test_a_plugin_that_changes_weights_works_on_decoded_weights(
    folder: Path, make_engine: Callable[..., Any], make_adapter: Callable[..., Path]
) -> None:
    adapter = {"lora": {"adapter": str(make_adapter(str(folder), targets="q_proj"))}}
    engine = make_engine(str(folder), dtype="float32")
    with_plugin, decoded, packed = (
        engine.generate(PROMPT, PARAMS, plan=engine.plan(plan))
        for plan in ({"packed_checkpoint": {}, **adapter}, adapter, {"packed_checkpoint": {}})
    )
    assert with_plugin.stats["failed"] == {} and with_plugin.token_ids == decoded.token_ids
    assert with_plugin.stats["weight_bytes"] > packed.stats["weight_bytes"]
    assert with_plugin.stats["notes"]["packed_checkpoint"] == {"dense, because a plugin changes weights": 15}
    assert packed.stats["notes"]["packed_checkpoint"] == {"4 bits, groups of 32: kernel": 14}
    assert with_plugin.token_ids != packed.token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ids_do_not_depend_on_the_batch(folder: Path, make_engine: Callable[..., Any], dtype: str) -> None:
    plugins = {"packed_checkpoint": {}}
    if dtype == "bfloat16":
        plugins |= {"flash_attention": {}, "fused_ops": {}}
    engine = make_engine(str(folder), dtype=dtype, plugins=plugins)
    prompts = [PROMPT, PROMPT[1:8] * 5, [1, 2, 3]]
    alone = [engine.generate(prompt, PARAMS).token_ids for prompt in prompts]
    together = [stream.result().token_ids for stream in [engine.submit(prompt, PARAMS) for prompt in prompts]]
    assert alone == together
