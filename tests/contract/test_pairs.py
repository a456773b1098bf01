"""Every pair of built-in plugins: it gives the right tokens, or it is refused with a reason.

The right tokens of a pair are those of its members that may change output: an `identical` or `rounding` member changes no token in
float64. In bfloat16, where the kernels in C serve, an answer may differ at ties.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from pitlane import BadOption, PlanConflict, SamplingParams
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import assert_only_ties_differ

REGISTRY = PluginRegistry.load()
TOGGLABLE = sorted(REGISTRY.togglable())
ALL_PAIRS = list(combinations(TOGGLABLE, 2))
QUANTIZERS = {"awq", "few_bits", "gptq", "mixed", "smoothquant"}
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=20)
PASSAGE = [random.Random(3).randrange(256) for _ in range(30)]
OPTIONS: dict[str, dict[str, Any]] = {  # the defaults do not fit a model of two layers
    **{name: {"tokens": 256} for name in ("awq", "gptq", "mixed", "smoothquant")},
    "self_speculation": {"num_layers": 1},
    "speculative": {"model": "random:tiny-cut"},
}


def is_exact(name: str) -> bool:
    plugin = REGISTRY.get(name)
    return plugin.exactness_for(plugin.parse_options(OPTIONS.get(name, {}))) in ("identical", "rounding")


def run_pairs(
    make_engine: Any, dtype: str, adapter: str, pairs: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """Run pairs on one engine. Returns the pairs that ran, and the reasons of the refused pairs.

    A pair is refused for an equal role, or because the engine's model, dtype or device does not serve a plugin.
    """
    options = {**OPTIONS, "lora": {"adapter": adapter}}
    engine, plain, ran, refused = make_engine(dtype=dtype), {}, [], {}
    prompt = PASSAGE * 3

    def settings(names: Any) -> dict[str, Any]:
        """The plugins, and the plugins that they require."""
        needed = [other for name in names for other in REGISTRY.get(name).requires]
        return {name: options.get(name, {}) for name in (*needed, *names)}

    plans = {}
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
        changing = tuple(name for name in pair if not is_exact(name))
        if changing not in plain:
            plain[changing] = engine.generate(prompt, PARAMS, plan=engine.plan(settings(changing)))
        for result in results:
            assert result.stats["failed"] == {}, pair
            if dtype == "float64":
                assert result.token_ids == plain[changing].token_ids, pair
            else:
                assert_only_ties_differ([plain[changing]], [result], PARAMS, 0.15)
        ran.append(pair)
    context = engine.loader.build_context
    missing = {name for name in TOGGLABLE if REGISTRY.get(name).unavailable(context) is not None}
    for pair, reason in refused.items():
        assert any(name in reason for name in settings(pair)), f"{pair}: {reason}"
        assert missing & set(pair) or has_one_role(pair) or conflict(pair) or pair in REFUSED, f"{pair}: {reason}"
    assert not any(has_one_role(pair) for pair in ran)
    return ran, refused


REFUSED = {
    ("attention_sinks", "kv_quant"),  # sinks are read from dense KV alone
    ("key_norm_eviction", "kv_quant"),  # keys are scored in dense KV alone
    ("key_norm_eviction", "prefix_cache"),  # a cached prefix needs all of its blocks
}


def has_one_role(pair: tuple[str, str]) -> bool:
    first, second = (REGISTRY.get(name).role for name in pair)
    return first is not None and first == second


def conflict(pair: tuple[str, str]) -> bool:
    """Whether a plugin of the pair, or a plugin that it requires, conflicts with the other plugin or has its role."""
    groups = [[REGISTRY.get(name) for name in (member, *REGISTRY.get(member).requires)] for member in pair]
    return any(
        a.name in b.conflicts or b.name in a.conflicts or (a.name != b.name and a.role and a.role == b.role)
        for a in groups[0]
        for b in groups[1]
    )


@pytest.mark.usefixtures("cut_tiny", "always_draft")
def test_every_pair_gives_the_right_tokens_or_is_refused(make_engine: Any, make_adapter: Any) -> None:
    """Plugins of rounded weights run with some others here; in bfloat16 all pairs run."""
    pairs = [
        pair
        for pair in ALL_PAIRS
        if not QUANTIZERS & set(pair)
        or set(pair) <= QUANTIZERS | {"packed_linear", "lora", "prefix_cache", "lookahead"}
    ]
    ran, refused = run_pairs(make_engine, "float64", str(make_adapter()), pairs)
    assert len(ran) + len(refused) == len(pairs) > 140
    assert ("kv_quant", "span_attention") in ran and ("kv_quant", "lookahead") in ran


@pytest.mark.slow
@pytest.mark.usefixtures("cut_tiny", "always_draft")
def test_every_pair_in_bfloat16(make_engine: Any, make_adapter: Any) -> None:
    """With the kernels in C, where this machine has them."""
    ran, refused = run_pairs(make_engine, "bfloat16", str(make_adapter()), ALL_PAIRS)
    assert len(ran) + len(refused) == len(TOGGLABLE) * (len(TOGGLABLE) - 1) // 2
    assert len(ran) > 20 and refused
