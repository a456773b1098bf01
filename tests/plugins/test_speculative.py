"""Speculative decoding with a draft model: options, refusals, memory and acceptance."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pitlane import BadOption, ModelError, SamplingParams
from pitlane.plugins.speculative import Speculative
from tests.integrity import assert_integrity

PARAMS = SamplingParams(max_tokens=48, ignore_eos=True)
PROMPT = [random.Random(0).randrange(256) for _ in range(50)]
SAMPLED = {"temperature": 0.9, "top_k": 40, "seed": 3}
each_mode = pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])


def test_options() -> None:
    options = Speculative.Options()
    assert (options.model, options.num_draft_tokens, options.branching) == ("bundled-drafter", 6, 1)
    with pytest.raises(BadOption, match="speculative.branching = '5'"):
        Speculative.parse_options({"branching": "5"})
    with pytest.raises(BadOption, match="speculative.num_draft_tokens = '0'"):
        Speculative.parse_options({"num_draft_tokens": "0"})


def test_the_bundled_drafter_is_refused_for_another_model(make_engine: Any) -> None:
    with pytest.raises(
        BadOption, match=r"this model: bundled-drafter drafts for .* `pitlane distill MODEL layers:0,1 FILES"
    ):
        make_engine().plan({"speculative": {}})
    assert "speculative" in make_engine("bundled").plan({"speculative": {}}).names


def test_a_draft_model_with_another_tokenizer_is_refused(make_engine: Any, shared_data: Path) -> None:
    engine = make_engine()
    plan = engine.plan({"speculative": {"model": str(shared_data / "models" / "stories260K")}})
    for _ in range(2):
        with pytest.raises(
            BadOption, match=r"cannot draft for random:tiny: its tokenizer differs; name a model of the"
        ):
            engine.submit(PROMPT, PARAMS, plan=plan).result()
    lane = engine.lane_of(engine.default_plan)
    assert lane.pool.num_withheld == 0 and lane.draft_models == {}
    assert len(engine.generate(PROMPT, PARAMS).token_ids) == 48, "other requests go on"


def test_an_unknown_draft_model_is_refused(make_engine: Any) -> None:
    engine = make_engine()
    with pytest.raises(ModelError, match="unknown preset 'gone'"):
        engine.lane_of(engine.plan({"speculative": {"model": "random:gone"}}))


@pytest.mark.usefixtures("always_draft")
@each_mode
def test_a_model_that_drafts_for_itself_is_always_right(make_engine: Any, sampling: dict[str, Any]) -> None:
    """The draft model draws with the target's noise, so at any temperature every draft is accepted whole."""
    engine = make_engine()
    params = SamplingParams(max_tokens=70, ignore_eos=True, **sampling)
    plain = engine.generate(PROMPT, params)
    plan = engine.plan({"speculative": {"model": "random:tiny", "num_draft_tokens": 6}})
    drafted = engine.generate(PROMPT, params, plan=plan)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats["steps"] == 1 + -(-69 // 7), "one step for the prompt, then seven tokens a step"
    assert drafted.stats["accepted_tokens"] == drafted.stats["draft_tokens"] == 70 - drafted.stats["steps"]
    assert drafted.stats["bought_ms"]["speculative"]["how"] == "modelled"


@pytest.mark.usefixtures("always_draft")
@each_mode
def test_a_tree_is_accepted_at_least_as_far_as_its_chain(
    make_engine: Any, cut_tiny: str, sampling: dict[str, Any]
) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=128, ignore_eos=True, **sampling)
    plain, steps = engine.generate(PROMPT, params), []
    for branching in (1, 2, 4):
        plan = engine.plan({"speculative": {"model": cut_tiny, "branching": branching, "num_draft_tokens": 2}})
        drafted = engine.generate(PROMPT, params, plan=plan)
        assert drafted.token_ids == plain.token_ids and drafted.stats["failed"] == {}
        steps.append(drafted.stats["steps"])
    assert steps[0] >= steps[1] >= steps[2] and steps[2] < steps[0], steps


@pytest.mark.usefixtures("always_draft")
def test_another_model_of_the_family_drafts(make_engine: Any, shared_data: Path) -> None:
    folder = shared_data / "models"
    engine = make_engine(str(folder / "babyllama-tok105"), kv_memory=2**28)
    params = SamplingParams(max_tokens=96, ignore_eos=True)
    plain = engine.generate("Once upon a time", params)
    plan = engine.plan({"speculative": {"model": str(folder / "babyllama-tok361-as-tok105")}})
    drafted = engine.generate("Once upon a time", params, plan=plan)
    assert drafted.token_ids == plain.token_ids and drafted.stats["failed"] == {}
    assert drafted.stats["draft_tokens"] > 0


def test_the_lane_is_shared_and_the_draft_model_loaded_once(make_engine: Any, cut_tiny: str) -> None:
    engine = make_engine()
    plans = [engine.plan({"speculative": {"model": cut_tiny, "num_draft_tokens": count}}) for count in (2, 5)]
    lanes = {id(engine.lane_of(plan)) for plan in (*plans, engine.default_plan)}
    assert len(lanes) == 1
    assert list(engine.lane_of(plans[0]).draft_models) == [cut_tiny]


def test_a_draft_model_may_be_opened_while_others_are_served(make_engine: Any, cut_tiny: str) -> None:
    engine = make_engine()
    long = SamplingParams(max_tokens=150, ignore_eos=True)
    expected = engine.generate(PROMPT, long).token_ids
    streams = [engine.submit(PROMPT, long) for _ in range(3)]
    drafted = engine.generate(PROMPT, long, plan=engine.plan({"speculative": {"model": cut_tiny}}))
    assert drafted.token_ids == expected
    assert all(stream.result().token_ids == expected for stream in streams)


@pytest.mark.usefixtures("always_draft")
def test_of_finished_sequences_only_shadows_are_kept(make_engine: Any, cut_tiny: str) -> None:
    engine = make_engine()
    plan = engine.plan({"speculative": {"model": cut_tiny}})
    streams = [engine.submit(PROMPT[: 9 + i], PARAMS, plan=plan) for i in range(4)]
    assert all(stream.result().stats["draft_tokens"] > 0 for stream in streams)
    (drafter,) = engine.lane_of(plan).draft_models.values()
    pool = drafter.pool
    assert len(drafter.shadows) == 4
    assert_integrity(pool, [shadow.kv for shadow in drafter.shadows.values()])
    assert pool.num_free_blocks < pool.num_blocks
