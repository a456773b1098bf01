"""Whole simulated runs: a drafter that does not help costs next to nothing, and a good drafter comes near the best draft length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.engine.pacing.scenarios import LOSERS, MIXED, WINNERS

LONG = {  # tokens of runs in which the first calls, whose time nobody knows before, are dear; elsewhere 1536 to 5000
    "search 10, no draft": 6000,
    "right, slower than steps": 6000,
    "tree never right, 16 seqs": 10000,
    "right at times, 16 seqs": 10000,
    "draft model, never right": 6000,
    "short drafts, dear steps": 6000,
    "never right, noise": 6000,
}
# The default tier: a scenario for every kind of drafter, machine and load. The slow tier runs the other scenarios.
DEFAULT = {
    "never right", "seldom right, slow", "right, slower than steps", "tree never right, 16 seqs", "never right, noise",
    "draft model, short answers", "never right, not calibrated", "short drafts, dear steps", "search 10, no draft",
    "search 0.5, rare drafts", "right", "half right, small gain", "always right, longer", "short drafts, 16 seqs",
    "tree", "draft model", "right, 16 seqs", "right, short answers", "right, slow moments, 8 seqs", "right, overhead",
    "right, not calibrated", "right, machine slower", "turns bad", "turns good", "lookup, slow search", "two drafters",
    "texts differ, 8 seqs", "machine slower, then a winner", "dearer with the text", "prompts beside a loser",
}  # fmt: skip


def scenarios(names: Iterable[str]) -> pytest.MarkDecorator:
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [name if name in DEFAULT else pytest.param(name, marks=slow) for name in names]
    )


@scenarios(LOSERS)
def test_a_drafter_that_does_not_help_costs_less_than_two_percent(name: str) -> None:
    scenario = LOSERS[name]
    plain = scenario.plain_seconds(1)
    assert scenario.best_seconds(1, (1, 4, 28)) > 0.98 * plain, "no draft length helps"
    scenario = replace(scenario, num_tokens=LONG.get(name, scenario.num_tokens))
    plain = scenario.plain_seconds(1)
    seconds = scenario.seconds(num_seeds=1)
    assert seconds < 1.02 * plain, f"costs {100 * (seconds / plain - 1):.2f} %"


@scenarios(WINNERS)
def test_a_good_drafter_comes_near_the_best_draft_length(name: str) -> None:
    scenario = WINNERS[name]
    best = scenario.best_seconds(1)
    assert best < 0.9 * scenario.plain_seconds(1), "drafts help"
    speed = best / scenario.seconds(num_seeds=1)
    assert speed > 0.95, f"reaches {100 * speed:.1f} % of the best speed"


@scenarios(["turns bad", "turns good", "texts differ", "texts differ, 8 seqs", "two drafters"])
def test_where_texts_change_or_differ_pacing_beats_every_fixed_draft_length(name: str) -> None:
    assert MIXED[name].seconds(num_seeds=1) < 0.95 * MIXED[name].best_seconds(1)


@scenarios(MIXED)
def test_pacing_is_never_much_slower_than_plain_steps(name: str) -> None:
    assert MIXED[name].seconds(num_seeds=1) < 1.02 * MIXED[name].plain_seconds(1)
