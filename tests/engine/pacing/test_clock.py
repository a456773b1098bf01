"""The step clock: running means by number of tokens, lines between measured sizes, and the prompt rate beyond them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pitlane.engine.pacing.clock import RECENT, StepClock


def test_before_the_first_forward_nothing_is_known() -> None:
    clock = StepClock()
    assert clock.estimate(1) is None
    assert clock.per_prompt_token is None


def test_a_measured_size_is_a_running_mean() -> None:
    clock = StepClock()
    clock.record(1, 0, 1.0)
    assert clock.estimate(1) == 1.0, "the first forward counts as it is"
    clock.record(1, 0, 2.0)
    assert clock.estimate(1) == pytest.approx(1.2)
    for _ in range(60):
        clock.record(1, 0, 3.0)
    assert clock.estimate(1) == pytest.approx(3.0, rel=1e-4), "old steps are forgotten"


def test_between_two_sizes_the_estimate_is_a_line() -> None:
    clock = StepClock()
    clock.record(2, 0, 1.0)
    clock.record(10, 0, 3.0)
    assert [clock.estimate(n) for n in (2, 4, 6, 10)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
    clock.record(6, 0, 1.2)
    assert clock.estimate(4) == pytest.approx(1.1), "the nearest sizes count"
    assert clock.estimate(8) == pytest.approx(2.1)


def test_more_tokens_are_never_estimated_to_take_less() -> None:
    clock = StepClock()
    clock.record(1, 0, 2.0)
    clock.record(9, 0, 1.0)  # noise
    assert [clock.estimate(n) for n in (1, 3, 9)] == [1.0, 1.0, 1.0]


def test_below_all_sizes_the_smallest_size_counts() -> None:
    clock = StepClock()
    clock.record(8, 0, 0.5)
    clock.record(20, 0, 0.9)
    assert clock.estimate(1) == 0.5


def test_beyond_all_sizes_a_token_costs_as_much_as_a_prompt_token() -> None:
    clock = StepClock()
    clock.record(4, 0, 1.0)
    assert clock.estimate(100) == 1.0, "nothing is known about more tokens"
    for seconds in (50.0, 3.2, 3.2):  # the first step of a process is slow
        clock.record(64, 64, seconds)
    assert clock.per_prompt_token == pytest.approx(0.05)
    assert clock.estimate(164) == pytest.approx(clock.by_tokens[64] + 100 * 0.05), "prompts do not change the pace"


def test_beyond_all_sizes_a_token_never_costs_more_than_a_whole_step() -> None:
    clock = StepClock({1: 0.5})
    clock.prompt_rates.append(2.0)
    assert clock.estimate(3) == pytest.approx(0.5 + 2 * 0.5)


def test_estimates_are_those_of_the_whole_curve() -> None:
    """Against the definition: no size takes longer than a larger size in recent steps without prompts; lines lie between."""
    generator = random.Random(1)
    for _ in range(40):
        clock = StepClock()
        decoded: list[int] = []
        for _ in range(generator.randrange(1, 120)):
            size = generator.choice([1, 1, 2, 5, 9, 17, generator.randrange(1, 600)])
            is_prompt = generator.random() < 0.3
            clock.record(size, size if is_prompt else 0, generator.random() * size)
            decoded = [*decoded, *([] if is_prompt else [size])][-RECENT:]
        sizes = sorted(clock.by_tokens)
        bounded = [min([clock.measured(n), *(clock.measured(d) for d in decoded if d >= n)]) for n in sizes]
        wanted = [generator.choice([generator.randrange(1, 700), 700 * generator.random()]) for _ in range(20)]
        beyond = np.maximum(0, np.array(wanted) - sizes[-1]) * min(clock.per_prompt_token or 0.0, bounded[-1])
        np.testing.assert_allclose(clock.estimates(wanted), np.interp(wanted, sizes, bounded) + beyond)


def test_only_steps_with_a_long_prompt_tell_the_prompt_rate() -> None:
    clock = StepClock()
    clock.record(100, 31, 1.0)
    assert clock.per_prompt_token is None
    clock.record(100, 32, 1.0)
    assert clock.per_prompt_token == pytest.approx(0.01)
    for _ in range(15):
        clock.record(100, 100, 2.0)
    assert len(clock.prompt_rates) == 15 and clock.per_prompt_token == pytest.approx(0.02)


def test_one_slow_moment_does_not_condemn_a_size() -> None:
    """It takes no longer than a larger size in a recent step. Steps with prompts want fewer logits and do not count."""
    clock = StepClock()
    clock.record(1, 0, 1.0)
    clock.record(5, 0, 9.0)
    clock.record(9, 20, 1.1)
    assert clock.estimate(5) == 9.0
    clock.record(8, 0, 1.3)
    assert [clock.estimate(n) for n in (1, 5, 8)] == [1.0, 1.3, 1.3]
    for _ in range(RECENT):
        clock.record(1, 0, 2.0)
    assert clock.estimate(1) == pytest.approx(2.0, rel=1e-4), "the text has grown"
    assert 9.0 < (clock.estimate(5) or 0.0) <= 18.0, "5 tokens have become slower with 1 token"


def test_sizes_without_recent_steps_are_scaled_by_the_drift_of_the_others() -> None:
    """A machine that becomes faster makes all steps faster, also those of sizes that drafts avoid because they were slow."""
    clock = StepClock()
    for number in (1, 5, 9):
        clock.record(number, 0, 1.0 + 0.1 * number)
    for seconds in [1.1] * RECENT + [0.55] * 60:
        clock.record(1, 0, seconds)
    assert clock.estimate(9) == pytest.approx(0.5 * 1.9, rel=0.05)
    clock.record(9, 0, 0.8)
    for _ in range(100):
        for number in (1, 5, 9):
            clock.record(number, 0, 1.0 + 0.1 * number)
    assert [clock.estimate(n) for n in (1, 5, 9)] == pytest.approx([1.1, 1.5, 1.9], rel=0.01), (
        "measured times count most"
    )


def test_noise_does_not_drive_the_pace_away() -> None:
    clock, generator = StepClock(), random.Random(3)
    clock.record(33, 0, 3.0)
    for _ in range(3000):
        number = generator.choice([1, 1, 1, 9])
        clock.record(number, 0, (1.0 if number == 1 else 1.5) * generator.gauss(1.0, 0.1))
    assert clock.estimate(33) == pytest.approx(3.0, rel=0.25)
    assert clock.estimate(1) == pytest.approx(1.0, rel=0.1) and clock.estimate(9) == pytest.approx(1.5, rel=0.1)


def test_overhead_is_the_median_of_recent_steps() -> None:
    clock = StepClock()
    assert clock.overhead == 0.0
    for seconds in (9.0, 1.0, 2.0):
        clock.record_overhead(seconds)
    assert clock.overhead == 2.0


def test_one_very_slow_forward_counts_for_twice_its_estimate() -> None:
    clock = StepClock()
    clock.record(1, 0, 1.0)
    clock.record(1, 0, 100.0)
    assert clock.estimate(1) == pytest.approx(1.2)
    for _ in range(60):
        clock.record(1, 0, 100.0)
    assert clock.estimate(1) == pytest.approx(100.0, rel=0.01), "a slow machine is believed in the end"


def test_a_machine_that_becomes_much_slower_is_believed_for_all_sizes() -> None:
    clock = StepClock()
    clock.record(9, 0, 9.0)
    for seconds in [1.0] * 200 + [10.0] * 60:
        clock.record(1, 0, seconds)
    assert clock.estimate(9) == pytest.approx(90.0, rel=0.2)
