"""The plugins with their Triton kernels write the tokens that they write without them. Triton's interpreter is the GPU here."""

from __future__ import annotations

from typing import Any

import pytest

from pitlane import Engine, SamplingParams
from pitlane.kernels.cuda import device

PROMPT = list(range(3, 73))  # two blocks, and tokens behind them
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PLUGINS = {
    "fused_ops": {"fused_ops": {}},
    "flash_attention": {"flash_attention": {}},
    "int8": {"int8": {}},
    "int4": {"int4": {}},
    "fp8": {"fp8": {}},
    "fp8 in blocks": {"fp8": {"granularity": "block"}},
    "kv_quant int8": {"kv_quant": {"format": "int8"}, "flash_attention": {}},
    "kv_quant fp8": {"kv_quant": {"format": "fp8"}, "flash_attention": {}},
    "all": {"fused_ops": {}, "flash_attention": {}, "int8": {}, "kv_quant": {}, "prompt_lookup": {}},
}
WITHOUT = ("fused_ops", "flash_attention")  # no kernels in C for float32


def tokens(plugins: dict[str, dict[str, Any]], model: str, prompt: list[int] | None) -> list[int]:
    with Engine(model, dtype="float32", plugins=plugins) as engine:
        text = engine.tokenizer.render_chat([{"role": "user", "content": "Name a colour."}])
        result = engine.generate(text if prompt is None else prompt, PARAMS)
        assert set(result.stats["plugins"]) == set(plugins) and not result.stats["failed"]
        return list(result.token_ids)


def check(name: str, monkeypatch: pytest.MonkeyPatch, model: str, prompt: list[int] | None) -> None:
    by_triton = tokens(PLUGINS[name], model, prompt)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not device.interpreted()
    rest = {plugin: options for plugin, options in PLUGINS[name].items() if plugin not in WITHOUT}
    assert by_triton == tokens(rest, model, prompt) and len(by_triton) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_the_tokens_of_a_tiny_model_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, monkeypatch, "random:tiny", PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused_ops", "flash_attention"])
def test_the_tokens_of_the_bundled_model_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, monkeypatch, "bundled", None)
