"""Every pair of built-in plugins: it gives the right tokens, or it is refused with a reason, as docs/compatibility.md says.

The right tokens of a pair are those of its members that may change output: an `identical` or `rounding` member changes no token in
float64. In bfloat16, where the kernels in C serve, an answer may differ at ties.
"""

from __future__ import annotations

import importlib.util
import random
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pitlane import BadOption, PlanConflict, SamplingParams
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import assert_only_ties_differ

REGISTRY = PluginRegistry.load()
TOGGLABLE = sorted(REGISTRY.togglable())
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=20)
PASSAGE = [random.Random(3).randrange(256) for _ in range(30)]
OPTIONS: dict[str, dict[str, Any]] = {
    # the defaults do not fit a model of two layers, take long, or change nothing in a short text
    **{name: {"tokens": 256} for name in ("awq", "gptq", "mixed", "smoothquant")},
    "self_speculation": {"num_layers": 1},
    "speculative": {"model": "random:tiny-cut"},
    "attention_sinks": {"window": 32, "stride": 32},
    "key_norm_eviction": {"budget": 64, "recent": 32, "interval": 32},
    "kv_quant": {"format": "int4"},
}


def generate() -> ModuleType:
    """docs/generate.py, which writes docs/compatibility.md."""
    path = Path(__file__).resolve().parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_exact(name: str) -> bool:
    plugin = REGISTRY.get(name)
    return plugin.exactness_for(plugin.parse_options(OPTIONS.get(name, {}))) in ("identical", "rounding")


def run_pairs(
    make_engine: Any, dtype: str, adapter: str, sample: int = 1
) -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """Run the pairs on one engine, or every `sample`-th pair. Returns the pairs that ran, and the reasons of the refused pairs.

    A pair is refused for an equal role, or because the engine's model, dtype or device does not serve a plugin.
    """
    options = {**OPTIONS, "lora": {"adapter": adapter}}
    engine, plain, ran, refused = make_engine(dtype=dtype), {}, [], {}
    prompt, docs = PASSAGE * 3, generate()

    def settings(names: Any) -> dict[str, Any]:
        return {name: options.get(name, {}) for name in docs.with_required(REGISTRY, names)}

    plans = {}
    pairs = list(combinations(TOGGLABLE, 2))[::sample]
    for pair in pairs:
        try:
            plans[pair] = engine.plan(settings(pair))
        except (PlanConflict, BadOption) as error:
            refused[pair] = str(error)
    for pair in sorted(plans, key=lambda pair: plans[pair].lane_key):  # every lane opens once
        try:
            results = [engine.generate(prompt, PARAMS, plan=plans[pair]) for _ in range(2)]
        except PlanConflict as error:
            refused[pair] = str(error)
            continue
        changing = tuple(name for name in settings(pair) if not is_exact(name))
        if changing not in plain:
            plain[changing] = engine.generate(prompt, PARAMS, plan=engine.plan(settings(changing)))
        for result in results:
            assert result.stats["failed"] == {}, pair
            if dtype == "float64":
                assert result.token_ids == plain[changing].token_ids, pair
            else:
                assert_only_ties_differ([plain[changing]], [result], PARAMS, 0.15)
        ran.append(pair)
    bare = engine.generate(prompt, PARAMS, plan=engine.plan({})).token_ids
    same = {changing for changing, result in plain.items() if changing and result.token_ids == bare}
    assert not same, f"with these options, {same} change no token, so nothing is proved for them"
    context = engine.loader.build_context
    missing = {name for name in TOGGLABLE if REGISTRY.get(name).unavailable(context) is not None}
    table = docs.verdicts(REGISTRY)
    assert set(pairs) == {*ran, *refused} and not set(ran) & set(refused)
    for pair, reason in ((pair, table[pair]) for pair in pairs):
        if missing & set(settings(pair)):
            assert any(name in refused[pair] for name in settings(pair)), f"{pair}: {refused[pair]}"
        else:
            assert refused.get(pair, "") == reason, f"{pair}: docs/compatibility.md says {reason or 'that it runs'}"
    assert not any(has_one_role(pair) for pair in ran)
    return ran, refused


def has_one_role(pair: tuple[str, str]) -> bool:
    first, second = (REGISTRY.get(name).role for name in pair)
    return first is not None and first == second


@pytest.mark.usefixtures("cut_tiny", "always_draft")
def test_a_sample_of_the_pairs_gives_the_right_tokens_or_is_refused(make_engine: Any, make_adapter: Any) -> None:
    """Every ninth pair; the slow tier runs all pairs."""
    ran, refused = run_pairs(make_engine, "float64", str(make_adapter()), sample=9)
    assert len(ran) > 15 and len(refused) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("cut_tiny", "always_draft")
def test_every_pair_gives_the_right_tokens_or_is_refused(make_engine: Any, make_adapter: Any) -> None:
    ran, refused = run_pairs(make_engine, "float64", str(make_adapter()))
    assert len(ran) + len(refused) == len(TOGGLABLE) * (len(TOGGLABLE) - 1) // 2
    assert ("kv_quant", "span_attention") in ran and ("kv_quant", "lookahead") in ran


@pytest.mark.slow
@pytest.mark.usefixtures("cut_tiny", "always_draft")
def test_every_pair_in_bfloat16(make_engine: Any, make_adapter: Any) -> None:
    """With the kernels in C, where this machine has them."""
    ran, refused = run_pairs(make_engine, "bfloat16", str(make_adapter()))
    assert len(ran) > 20 and refused
