"""Attention sinks: the logits of a plain reference, over several strides, and the same answers however they are computed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from pitlane.engine.kv.capacity import BLOCK_SIZE
from pitlane.engine.kv.visibility import checked
from pitlane.engine.models import presets
from pitlane.engine.models.families.core import parse_config
from pitlane.plugins.attention_sinks import BLOCK, SinkWindow
from tests.plugins.sink_reference import engine_logits, reference_logits, visible_tokens

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {
        "model_type": "llama",
        "rope_scaling": presets.LLAMA32_ROPE | {"original_max_position_embeddings": 64, "factor": 4.0},
    },
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 40, "sliding_window_pattern": 3},
}
SINKS = {"num_sinks": 4, "window": 64, "stride": 32}


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(count)]


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`random:tiny-llama` and so on, with a context of 256 tokens."""
    shapes = {f"tiny-{name}": parse_config(SHAPE | values) for name, values in MODELS.items()}
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **shapes})


def test_a_window_moves_in_strides_and_keeps_the_sinks() -> None:
    visibility = SinkWindow(4, 64, 32)
    positions = np.arange(300)
    starts = checked(visibility, 300).starts(positions)
    for position, start in zip(positions.tolist(), starts.tolist(), strict=True):
        seen = visible_tokens(position, 4, 64, 32)
        assert [*range(min(4, start)), *range(start, position + 1)] == seen
        assert len(seen) <= visibility.max_tokens and start % 32 == 0
    assert BLOCK == BLOCK_SIZE


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_positions_inside_the_cache(make_engine: Any, model: str) -> None:
    num_sinks, ids = {"llama": 40, "qwen3": 1}.get(model, 4), tokens(230)
    plugins = {"attention_sinks": SINKS | {"num_sinks": num_sinks}}
    engine = make_engine(f"random:tiny-{model}", dtype="float32", plugins=plugins)
    lane = engine.lane_of(engine.default_plan)
    expected = reference_logits(lane.built.model, ids, num_sinks, 64, 32)
    for step in (1, 37):
        torch.testing.assert_close(engine_logits(lane, ids, step), expected, rtol=1e-4, atol=1e-4)
    lane = engine.lane_of(engine.plan(plugins | {"span_attention": {}}))
    for step in (1, 37, 90):
        torch.testing.assert_close(engine_logits(lane, ids, step), expected, rtol=1e-4, atol=1e-4)
    lane = engine.lane_of(engine.plan({}))
    assert not torch.allclose(engine_logits(lane, ids, 37), expected, atol=1e-2), "the sinks change the logits"
