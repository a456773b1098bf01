"""Self-speculation: options, refusals, acceptance, and no memory of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pitlane import BadOption, SamplingParams
from pitlane.plugins.self_speculation import SelfSpeculation

PARAMS = SamplingParams(max_tokens=48, ignore_eos=True)
PROMPT = [random.Random(0).randrange(256) for _ in range(50)]


def test_options() -> None:
    options = SelfSpeculation.Options()
    assert (options.num_layers, options.num_draft_tokens) == (0, 4)
    with pytest.raises(BadOption, match="self_speculation.num_layers = '-1'"):
        SelfSpeculation.parse_options({"num_layers": "-1"})


def test_more_layers_than_the_model_has_are_refused(make_engine: Any) -> None:
    engine = make_engine()
    for _ in range(2):
        with pytest.raises(BadOption, match="after 2 layers: the model has 2; choose 1 to 1"):
            engine.submit(PROMPT, PARAMS, plan=engine.plan({"self_speculation": {"num_layers": 2}})).result()
    assert len(engine.generate(PROMPT, PARAMS).token_ids) == 48, "other requests go on"


@pytest.mark.usefixtures("always_draft")
def test_it_needs_no_memory_and_shares_the_lane(make_engine: Any) -> None:
    engine = make_engine()
    plain = engine.generate(PROMPT, PARAMS)
    plan = engine.plan({"self_speculation": {"num_layers": 1}})
    drafted = engine.generate(PROMPT, PARAMS, plan=plan)
    assert drafted.token_ids == plain.token_ids and drafted.stats["failed"] == {}
    assert drafted.stats["draft_tokens"] > 0
    lane = engine.lane_of(plan)
    assert lane is engine.lane_of(engine.default_plan)
    assert lane.pool.num_free_blocks == lane.pool.num_blocks


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 3}], ids=["greedy", "sampled"])
def test_more_layers_are_accepted_more_often(make_engine: Any, shared_data: Path, sampling: dict[str, Any]) -> None:
    """Drafts of four layers out of five are accepted more often than drafts of one."""
    engine = make_engine(str(shared_data / "models" / "stories260K"), kv_memory=2**28)
    params = SamplingParams(max_tokens=96, ignore_eos=True, **sampling)
    plain, shares = engine.generate("Once upon a time", params), []
    for num_layers in (1, 4):
        plan = engine.plan({"self_speculation": {"num_layers": num_layers, "num_draft_tokens": 2}})
        drafted = engine.generate("Once upon a time", params, plan=plan)
        assert drafted.token_ids == plain.token_ids
        shares.append(drafted.stats["accepted_tokens"] / drafted.stats["draft_tokens"])
    assert shares[0] < shares[1] < 1 and shares[1] > 0.1, shares


@pytest.mark.usefixtures("always_draft")
def test_cached_prefixes_serve_the_early_layers_too(make_engine: Any) -> None:
    engine = make_engine()
    plan = engine.plan({"self_speculation": {"num_layers": 1}, "prefix_cache": {}})
    first, second = (engine.generate(PROMPT, PARAMS, plan=plan) for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.stats["cached_tokens"] > 0
    assert second.stats["accepted_tokens"] == first.stats["accepted_tokens"], "the same KV gives the same drafts"
