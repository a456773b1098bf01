"""The plugins with their Triton kernels write the tokens that they write without them. Triton's interpreter is the GPU here."""

from __future__ import annotations

import pytest

from pitlane import Engine, SamplingParams
from pitlane.kernels.cuda import device

PLUGINS = {"fused_ops": ["fused_ops"], "paged_attention": ["paged_attention"], "int8": ["int8"], "int4": ["int4"]}
PROMPT = [{"role": "user", "content": "Name a colour."}]


def tokens(plugins: list[str], drafter: bool = False) -> list[int]:
    settings: dict[str, dict[str, object]] = {name: {} for name in plugins}
    if drafter:
        settings["prompt_lookup"] = {}
    with Engine("bundled", dtype="float32", plugins=settings) as engine:
        prompt = engine.tokenizer.render_chat(PROMPT)
        result = engine.generate(prompt, SamplingParams(max_tokens=3))
        assert set(result.stats["plugins"]) == set(settings)
        return list(result.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_the_tokens_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_triton = tokens(PLUGINS[name])
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not device.interpreted()
    by_torch = tokens([name] if name.startswith("int") else [])  # the others have no C kernels for float32
    assert by_triton == by_torch and len(by_triton) == 3


@pytest.mark.slow
def test_all_plugins_at_once_with_a_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    by_triton = tokens(["fused_ops", "paged_attention", "int8"], drafter=True)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert by_triton == tokens(["int8"], drafter=True)
