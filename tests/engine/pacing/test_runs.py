"""Whole simulated runs: a drafter that does not help costs next to nothing, and a good drafter comes near the best draft length."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.pacing.scenarios import LOSERS, MIXED, WINNERS

NUM_SEEDS = 1
TAKES_ITS_TIME = {  # what a first call costs is unknown before; longer runs show that it is paid once
    "search 10, no draft": 6000,
    "right, slower than steps": 6000,
    "tree never right, 16 seqs": 10000,
    "right at times, 16 seqs": 10000,
    "draft model, never right": 3000,
}
NEAR = {  # the share of the best draft length's speed that pacing reaches; 0.95 elsewhere
    "half right, small gain": 0.90,
    "right, noise": 0.90,
    "right, 16 seqs": 0.92,
}


@pytest.mark.parametrize("name", LOSERS)
def test_a_drafter_that_does_not_help_costs_less_than_two_percent(name: str) -> None:
    scenario = replace(LOSERS[name], num_tokens=TAKES_ITS_TIME.get(name, LOSERS[name].num_tokens))
    plain = scenario.plain_seconds(NUM_SEEDS)
    assert LOSERS[name].best_seconds(NUM_SEEDS) > 0.99 * plain, "no draft length helps"
    seconds = scenario.seconds(num_seeds=NUM_SEEDS)
    assert seconds < 1.02 * plain, f"costs {100 * (seconds / plain - 1):.2f} %"


@pytest.mark.parametrize("name", WINNERS)
def test_a_good_drafter_comes_near_the_best_draft_length(name: str) -> None:
    scenario = WINNERS[name]
    best = scenario.best_seconds(NUM_SEEDS)
    assert best < 0.9 * scenario.plain_seconds(NUM_SEEDS), "drafts help"
    speed = best / scenario.seconds(num_seeds=NUM_SEEDS)
    assert speed > NEAR.get(name, 0.95), f"reaches {100 * speed:.1f} % of the best speed"


@pytest.mark.parametrize("name", ["turns bad", "turns good", "texts differ", "texts differ, 8 seqs", "two drafters"])
def test_where_texts_change_or_differ_pacing_beats_every_fixed_draft_length(name: str) -> None:
    assert MIXED[name].seconds(num_seeds=NUM_SEEDS) < 0.95 * MIXED[name].best_seconds(NUM_SEEDS)


@pytest.mark.parametrize("name", MIXED)
def test_pacing_is_never_much_slower_than_plain_steps(name: str) -> None:
    assert MIXED[name].seconds(num_seeds=NUM_SEEDS) < 1.02 * MIXED[name].plain_seconds(NUM_SEEDS)
