"""The contract of every plugin, checked on all built-in plugins."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pitlane import Plugin, Result, SamplingParams
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import assert_only_ties_differ, check_plugin

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
KERNELS: dict[str, dict[str, Any]] = {"packed_linear": {}, "flash_attention": {}, "fused_ops": {}}
BASES = {"compiled_step": KERNELS}
BOUNDS = {  # mean share of the next token's probability that may move, on `random:tiny` with the options above
    "int8": 0.01,
    "fp8": 0.03,
    "int4": 0.06,
    "kv_quant": 0.001,
    "awq": 0.08,
    "gptq": 0.09,
    "smoothquant": 0.01,
    "mixed": 0.06,
    "few_bits": 0.06,
    "attention_sinks": 0.15,
    "key_norm_eviction": 0.09,
}


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


def answers(engine: Any, settings: dict[str, Any], count: int, num_tokens: int, **sampling: Any) -> list[Result]:
    """Answers to the prompts in one batch, then answers of a quarter of the tokens with warm caches."""
    plan, results = engine.plan(settings), []
    for max_tokens in (num_tokens, num_tokens // 4):
        streams = [
            engine.submit(p, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed, **sampling), plan=plan)
            for seed, p in enumerate(prompts(count))
        ]
        results += [stream.result() for stream in streams]
    return results


def test_names_agree_with_files() -> None:
    assert all(plugin.__module__ == f"pitlane.plugins.{plugin.name}" for plugin in PLUGINS)
    assert [entry.reason for entry in REGISTRY if entry.status == "failed"] == []


@pytest.fixture
def tiny_adapter(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter for `random:tiny`: without one, `lora` refuses to start."""
    monkeypatch.setitem(OPTIONS, "lora", {"adapter": str(make_adapter())})


@pytest.mark.usefixtures("cut_tiny", "tiny_adapter")
@pytest.mark.parametrize("drafters", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "drafters"])
@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_the_contract(plugin: type[Plugin], drafters: bool) -> None:
    """The kit of plugin authors, on every built-in plugin.

    `identical` plugins are compared over 48 tokens of an answer, in the slow tier over 256. In the default tier, test_pairs.py runs
    drafters beside the plugins.
    """
    outcome = check_plugin(
        plugin,
        OPTIONS.get(plugin.name),
        base=BASES.get(plugin.name),
        bound=BOUNDS.get(plugin.name),
        num_tokens=(256 if plugin.exactness == "identical" else 64)
        if drafters
        else 48
        if plugin.exactness == "identical"
        else 32,
        drafters=drafters,
    )
    outcome.assert_passed()
    if outcome.status_of("exactness") == "skipped":
        pytest.skip(outcome.findings[-1].detail)
    outcome.assert_proved()


@pytest.fixture(scope="module")
def plain_answers() -> Callable[..., list[Any]]:
    """The answers of the plan `base`, computed once: `plain_answers(engine, dtype, base, num_tokens, **sampling)`."""
    known: dict[str, list[Any]] = {}

    def get(engine: Any, dtype: str, base: dict[str, Any], num_tokens: int, **sampling: Any) -> list[Any]:
        key = f"{dtype} {base} {num_tokens} {sampling}"
        if key not in known:
            known[key] = answers(engine, base, 4, num_tokens, **sampling)
        return known[key]

    return get


@pytest.mark.usefixtures("cut_tiny")
@pytest.mark.parametrize(
    ("dtype", "sampling", "num_tokens"),
    [
        pytest.param("float32", SAMPLING[1], 80, id="float32-sampled-80"),
        pytest.param("bfloat16", SAMPLING[0], 80, id="bfloat16-greedy-80"),
        pytest.param("float32", SAMPLING[0], 256, id="float32-greedy", marks=pytest.mark.slow),
        pytest.param("float32", SAMPLING[1], 256, id="float32-sampled", marks=pytest.mark.slow),
        pytest.param("bfloat16", SAMPLING[0], 256, id="bfloat16-greedy", marks=pytest.mark.slow),
        pytest.param("bfloat16", SAMPLING[1], 256, id="bfloat16-sampled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("plugin", IDENTICAL, ids=lambda plugin: plugin.name)
def test_in_lower_precision_only_ties_differ(
    make_engine: Any, plain_answers: Any, plugin: type[Plugin], sampling: dict[str, Any], dtype: str, num_tokens: int
) -> None:
    """At the first different token, the choice or the edge of top-k is closer than the rounding between batch shapes."""
    engine, base = make_engine(dtype=dtype), BASES.get(plugin.name, {})
    if base:
        skip_if_unavailable(engine, plugin)
    plain = plain_answers(engine, dtype, base, num_tokens, logprobs=50, **sampling)
    with_plugin = answers(engine, base | settings_of(plugin), 4, num_tokens, **sampling)
    assert_only_ties_differ(plain, with_plugin, SamplingParams(**sampling), {"float32": 1e-4, "bfloat16": 0.15}[dtype])
