"""The operation `sample` of a plugin draws the tokens of a step: the tokens of the host, for rows of drafts and samples too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pitlane import BuildContext, Plugin, PluginOptions, PluginRegistry, SamplingParams, hookimpl
from pitlane.engine.decode.sampling import noise, survivors

PROMPT = list(range(10, 50))
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, top_k=60, top_p=0.95, seed=5)
BOTH = [PARAMS, replace(PARAMS, sample_index=1)]
CALLS: list[int] = []


def draw(logits: Tensor, keys: list[int], temperatures: list[float], *filters: list[Any]) -> Tensor:
    CALLS.append(len(logits))
    tokens = []
    for row, key, temperature, top_k, top_p, min_p in zip(
        logits.double().numpy(), keys, temperatures, *filters, strict=True
    ):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        scaled = (row - row.max()) / (temperature or 1.0)
        ids = survivors(scaled, params)
        tokens.append(int(ids[np.argmax(scaled[ids] + noise(key, ids))]) if temperature else int(row.argmax()))
    return torch.tensor(tokens)


class Draws(Plugin):
    name, exactness = "draws", "identical"

    class Options(PluginOptions):
        fault: str = ""

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Any:
        faults = {
            "": draw,
            "raises": self.fail,
            "beyond": lambda logits, *_: torch.full((len(logits),), logits.shape[1]),
        }
        faults["short"] = lambda *arguments: draw(*arguments)[1:]
        return faults[self.options.fault] if kind == "sample" else None

    def fail(self, *_: Any) -> Tensor:
        raise RuntimeError("no device")


@pytest.fixture
def registry() -> PluginRegistry:
    CALLS.clear()
    registry = PluginRegistry.load()
    registry.add(Draws)
    return registry


@pytest.mark.parametrize("plugins", [{}, {"self_speculation": {"num_layers": 1}}], ids=["plain", "drafts"])
def test_the_tokens_are_those_of_the_host(make_engine: Any, registry: PluginRegistry, plugins: dict[str, Any]) -> None:
    engine = make_engine(dtype="float32", registry=registry, plugins=plugins)
    on_host = [result.token_ids for result in engine.generate([PROMPT] * 2, BOTH)]
    assert not CALLS
    drawn = engine.generate([PROMPT] * 2, BOTH, plan=engine.plan({**plugins, "draws": {}}))
    assert [result.token_ids for result in drawn] == on_host and not any(result.stats["failed"] for result in drawn)
    assert CALLS and (max(CALLS) > 2) == bool(plugins)


def test_greedy_rows_are_not_drawn(make_engine: Any, registry: PluginRegistry) -> None:
    engine = make_engine(dtype="float32", registry=registry, plugins={"draws": {}})
    engine.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    assert not CALLS


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "RuntimeError: no device"),
        ("beyond", r"ValueError: returned \["),
        ("short", r"ValueError: returned \["),
    ],
)
def test_if_the_operation_fails_the_host_draws(
    make_engine: Any, registry: PluginRegistry, fault: str, message: str
) -> None:
    engine = make_engine(dtype="float32", registry=registry, plugins={})
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.9, seed=5)
    expected = engine.generate(PROMPT, params)
    result = engine.generate(PROMPT, params, plan=engine.plan({"draws": {"fault": fault}}))
    assert result.token_ids == expected.token_ids
    with pytest.raises(AssertionError, match=f"draws.sample: {message}"):
        assert not result.stats["failed"], result.stats["failed"]["draws"]
