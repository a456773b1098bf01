"""Pacing in the engine: a drafter that does not help is paused, the stats say why, and the tokens are those without it."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from pitlane import Draft, Limits, Plugin, PluginOptions, SamplingParams, Sequence, hookimpl
from pitlane.engine.plan.registry import PluginRegistry


class Hopeless(Plugin):
    """Gives drafts that are never right, slowly."""

    name, role, exactness = "hopeless", "drafter", "identical"
    asked: list[int]

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.asked = []

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        self.asked += limits.num_draft_tokens
        sum(range(300_000))  # milliseconds, beside a forward of about one
        return [Draft([511] * limit) for limit in limits.num_draft_tokens]


def test_a_drafter_that_is_never_right_is_paused_and_the_stats_say_why(make_engine: Any) -> None:
    registry = PluginRegistry.load()
    registry.add(Hopeless)
    engine = make_engine(registry=registry)
    params = SamplingParams(max_tokens=128, ignore_eos=True)
    prompt = [random.Random(3).randrange(256) for _ in range(40)]
    plan = engine.plan({"hopeless": {}})
    plain, result = engine.generate(prompt, params), engine.generate(prompt, params, plan=plan)
    assert result.token_ids == plain.token_ids
    assert plain.stats["paused"] == {}
    assert "plain steps" in result.stats["paused"]["hopeless"]
    asked = list(plan.plugins[0].asked)
    assert 1 <= len(asked) < 20 and all(0 < number <= 64 for number in asked)
    again = engine.generate(prompt, params, plan=plan)
    assert len(plan.plugins[0].asked) - len(asked) <= 4 and "hopeless" in again.stats["paused"], "the lane knows it"


class Sleeper(Plugin):
    """Sleeps in one of its hooks, and gives no draft or drafts that are never right."""

    name, role, exactness = "sleeper", "drafter", "identical"

    class Options(PluginOptions):
        hook: str = "propose"
        drafts: bool = False

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.calls = 0

    def sleep(self, hook: str) -> None:
        self.calls += hook == self.options.hook
        time.sleep(0.05 if hook == self.options.hook else 0.0)

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        self.sleep("propose")
        return [Draft([511] * limit) if self.options.drafts else None for limit in limits.num_draft_tokens]

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        self.sleep("after_verify")


@pytest.mark.parametrize(
    "options",
    [{}, {"drafts": True}, {"drafts": True, "hook": "after_verify"}],
    ids=["no draft", "drafts", "after_verify"],
)
def test_a_drafter_that_sleeps_is_paused_from_the_first_steps_on(make_engine: Any, options: dict[str, Any]) -> None:
    registry = PluginRegistry()
    registry.add(Sleeper)
    engine = make_engine(registry=registry)
    plan = engine.plan({"sleeper": options})
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    result = engine.generate([1, 2, 3], params, plan=plan)
    assert plan.plugins[0].calls < 20 and "sleeper" in result.stats["paused"]
    assert result.token_ids == engine.generate([1, 2, 3], params).token_ids
