"""The contract of every plugin, checked on all built-in plugins."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pitlane import Plugin, Result, SamplingParams
from pitlane.engine.plan.plugin import EXACTNESS
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import assert_only_ties_differ

REGISTRY = PluginRegistry.load()
PLUGINS = [entry.plugin for entry in REGISTRY if entry.plugin is not None]
TOGGLABLE = [REGISTRY.get(name) for name in sorted(REGISTRY.togglable())]
IDENTICAL = [plugin for plugin in TOGGLABLE if plugin.exactness == "identical"]
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.5},
]
OPTIONS: dict[str, dict[str, Any]] = {  # the defaults do not fit a model of two layers, or short prompts
    "attention_sinks": {"window": 64, "stride": 32},
    **{
        name: {"tokens": 256} for name in ("awq", "gptq", "mixed", "smoothquant")
    },  # of calibration: a test waits for them
    "key_norm_eviction": {"budget": 64, "recent": 32, "interval": 32},
    "self_speculation": {"num_layers": 1},
    "speculative": {"model": "random:tiny-cut"},
}
# compiled_step serves bfloat16 alone, with these kernels; it is compared with the same plan without it
KERNELS: dict[str, dict[str, Any]] = {"packed_linear": {}, "paged_attention": {}, "fused_ops": {}}
BASES = {"compiled_step": KERNELS}
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)


def prompts(count: int, vocab: int = 256) -> list[list[int]]:
    """Half of the prompts are random, half repeat a passage, so that drafters and caches have something to do."""
    result = []
    for seed in range(count):
        generator = random.Random(seed)
        tokens = [generator.randrange(vocab) for _ in range(20 + 7 * seed)]
        result.append(tokens * 3 if seed % 2 else tokens)
    return result


def settings_of(plugin: type[Plugin]) -> dict[str, Any]:
    """The plugin, and the plugins that it requires."""
    return {name: OPTIONS.get(name, {}) for name in (*plugin.requires, plugin.name)}


def engine_for(make_engine: Any, plugin: type[Plugin]) -> Any:
    """An engine with a dtype that the plugin supports."""
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(dtype=dtype)
        reason = plugin.unavailable(engine.loader.build_context)
        if reason is None:
            return engine
    return pytest.skip(reason)


def skip_if_unavailable(engine: Any, plugin: type[Plugin]) -> None:
    reason = plugin.unavailable(engine.loader.build_context)
    if reason is not None:
        pytest.skip(reason)


def answers(engine: Any, settings: dict[str, Any], count: int, **sampling: Any) -> list[Result]:
    """Answers of 256 tokens to the prompts, in one batch, and of 64 tokens again with warm caches."""
    plan, results = engine.plan(settings), []
    for max_tokens in (256, 64):
        streams = [
            engine.submit(p, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed, **sampling), plan=plan)
            for seed, p in enumerate(prompts(count))
        ]
        results += [stream.result() for stream in streams]
    return results


def test_names_agree_with_files() -> None:
    assert all(plugin.__module__ == f"pitlane.plugins.{plugin.name}" for plugin in PLUGINS)
    assert [entry.reason for entry in REGISTRY if entry.status == "failed"] == []


@each_plugin
def test_docstring_says_what_it_does(plugin: type[Plugin]) -> None:
    doc = sys.modules[plugin.__module__].__doc__ or ""
    lines = [line.strip() for line in doc.splitlines()]
    assert lines[0].endswith(".")
    assert any(line.startswith(("Changes in the loop:", "Changes outside the loop:")) for line in lines)
    assert any(line.startswith(f"Exactness: {plugin.exactness}") for line in lines)
    assert any("Costs:" in line for line in lines)


@each_plugin
def test_options_describe_themselves(plugin: type[Plugin]) -> None:
    for name, field in plugin.Options.model_fields.items():
        assert field.description, f"{plugin.name}.{name} lacks a description"
        assert not field.is_required(), f"{plugin.name}.{name} needs a default"
    assert plugin.exactness_for(plugin.Options()) in EXACTNESS


@pytest.fixture
def tiny_adapter(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter for `random:tiny`: without one, `lora` refuses to start."""
    monkeypatch.setitem(OPTIONS, "lora", {"adapter": str(make_adapter())})


@pytest.mark.usefixtures("cut_tiny", "tiny_adapter")
@pytest.mark.parametrize("plugin", TOGGLABLE, ids=lambda plugin: plugin.name)
def test_on_and_off_leaves_the_engine_bit_identical(make_engine: Any, plugin: type[Plugin]) -> None:
    engine = engine_for(make_engine, plugin)
    params = SamplingParams(max_tokens=64, ignore_eos=True, logprobs=5)
    before = engine.generate(prompts(2)[1], params)
    engine.generate(prompts(2)[1], params, plan=engine.plan(settings_of(plugin)))
    after = engine.generate(prompts(2)[1], params)
    assert after.token_ids == before.token_ids
    assert after.logprobs == before.logprobs, "logprobs are not equal to the bit"


@pytest.fixture(scope="module")
def plain_answers() -> Callable[..., list[Any]]:
    """The answers of the plan `base`, computed once for all plugins: `plain_answers(engine, dtype, base, **sampling)`."""
    known: dict[str, list[Any]] = {}

    def get(engine: Any, dtype: str, base: dict[str, Any], **sampling: Any) -> list[Any]:
        key = f"{dtype} {base} {sampling}"
        if key not in known:
            known[key] = answers(engine, base, 4, **sampling)
        return known[key]

    return get


@pytest.mark.usefixtures("cut_tiny")
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("plugin", IDENTICAL, ids=lambda plugin: plugin.name)
def test_identical_plugins_give_the_same_tokens(
    make_engine: Any, plain_answers: Any, plugin: type[Plugin], sampling: dict[str, Any]
) -> None:
    base = BASES.get(plugin.name, {})
    dtype = "bfloat16" if base else "float64"
    engine = make_engine(dtype=dtype)
    skip_if_unavailable(engine, plugin)
    plain = plain_answers(engine, dtype, base, **sampling)
    with_plugin = answers(engine, base | settings_of(plugin), 4, **sampling)
    assert [r.token_ids for r in with_plugin] == [r.token_ids for r in plain]
    assert [len(r.token_ids) for r in with_plugin] == [256] * 4 + [64] * 4


@pytest.mark.usefixtures("cut_tiny")
@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        pytest.param("float32", SAMPLING[0], id="float32-greedy", marks=pytest.mark.slow),
        pytest.param("float32", SAMPLING[1], id="float32-sampled"),
        pytest.param("bfloat16", SAMPLING[0], id="bfloat16-greedy"),
        pytest.param("bfloat16", SAMPLING[1], id="bfloat16-sampled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("plugin", IDENTICAL, ids=lambda plugin: plugin.name)
def test_in_lower_precision_only_ties_differ(
    make_engine: Any, plain_answers: Any, plugin: type[Plugin], sampling: dict[str, Any], dtype: str
) -> None:
    """At the first different token, the choice or the edge of top-k is closer than the rounding between batch shapes."""
    engine, base = make_engine(dtype=dtype), BASES.get(plugin.name, {})
    if base:
        skip_if_unavailable(engine, plugin)
    plain = plain_answers(engine, dtype, base, logprobs=50, **sampling)
    with_plugin = answers(engine, base | settings_of(plugin), 4, **sampling)
    assert_only_ties_differ(plain, with_plugin, SamplingParams(**sampling), {"float32": 1e-4, "bfloat16": 0.15}[dtype])
