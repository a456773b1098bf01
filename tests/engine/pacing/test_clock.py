"""The step clock: running means by number of tokens, and what lies between and beyond them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pitlane.engine.pacing.clock import RECENT, StepClock


def test_nothing_is_known_before_anything_was_seen() -> None:
    clock = StepClock()
    assert clock.estimate(1) is None
    assert clock.per_prompt_token is None


def test_a_size_that_was_seen_is_a_running_mean() -> None:
    clock = StepClock()
    clock.record(1, 0, 1.0)
    assert clock.estimate(1) == 1.0, "the first one is taken as it is"
    clock.record(1, 0, 2.0)
    assert clock.estimate(1) == pytest.approx(1.2)
    for _ in range(60):
        clock.record(1, 0, 3.0)
    assert clock.estimate(1) == pytest.approx(3.0, rel=1e-4), "old steps are forgotten"


def test_between_two_sizes_it_is_a_line() -> None:
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


def test_below_all_sizes_it_is_the_smallest_one() -> None:
    clock = StepClock()
    clock.record(8, 0, 0.5)
    clock.record(20, 0, 0.9)
    assert clock.estimate(1) == 0.5


def test_beyond_all_sizes_each_token_costs_what_a_prompt_token_does() -> None:
    clock = StepClock()
    clock.record(4, 0, 1.0)
    assert clock.estimate(100) == 1.0, "nothing is known of more tokens"
    for seconds in (50.0, 3.2, 3.2):  # the first step of a process is slow
        clock.record(64, 64, seconds)
    assert clock.per_prompt_token == pytest.approx(0.05)
    assert clock.estimate(164) == pytest.approx(clock.by_tokens[64] + 100 * 0.05), "prompts tell nothing of the pace"


def test_a_token_beyond_never_costs_more_than_a_whole_step() -> None:
    clock = StepClock({1: 0.5})
    clock.prompt_rates.append(2.0)
    assert clock.estimate(3) == pytest.approx(0.5 + 2 * 0.5)


def test_estimates_are_those_of_the_whole_curve() -> None:
    """Against its definition: the sizes that were seen, none above what a larger one without prompts took, with lines between."""
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
        held = [min([clock.seen(n), *(clock.seen(d) for d in decoded if d >= n)]) for n in sizes]
        wanted = [generator.choice([generator.randrange(1, 700), 700 * generator.random()]) for _ in range(20)]
        beyond = np.maximum(0, np.array(wanted) - sizes[-1]) * min(clock.per_prompt_token or 0.0, held[-1])
        np.testing.assert_allclose(clock.estimates(wanted), np.interp(wanted, sizes, held) + beyond)


def test_only_steps_with_a_prompt_tell_of_prompts() -> None:
    clock = StepClock()
    clock.record(100, 31, 1.0)
    assert clock.per_prompt_token is None
    clock.record(100, 32, 1.0)
    assert clock.per_prompt_token == pytest.approx(0.01)
    for _ in range(15):
        clock.record(100, 100, 2.0)
    assert len(clock.prompt_rates) == 15 and clock.per_prompt_token == pytest.approx(0.02)


def test_a_size_that_was_slow_once_is_not_condemned() -> None:
    """It takes no longer than a larger one does, as long as that is fresh; and prompts, which want one row, say nothing."""
    clock = StepClock()
    clock.record(1, 0, 1.0)
    clock.record(5, 0, 9.0)
    clock.record(9, 20, 1.1)
    assert clock.estimate(5) == 9.0
    clock.record(8, 0, 1.3)
    assert [clock.estimate(n) for n in (1, 5, 8)] == [1.0, 1.3, 1.3]
    for _ in range(RECENT):
        clock.record(1, 0, 2.0)
    assert clock.estimate(1) == pytest.approx(2.0, rel=1e-4), "the text has grown since"
    assert 9.0 < clock.estimate(5) <= 18.0, "what made 1 slower made 5 so"


def test_sizes_that_are_not_seen_keep_pace_with_those_that_are() -> None:
    """A machine that becomes faster makes all steps faster, also of sizes that are left alone since they seemed too slow."""
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
    assert [clock.estimate(n) for n in (1, 5, 9)] == pytest.approx([1.1, 1.5, 1.9], rel=0.01), "what is seen counts"


def test_noise_does_not_drive_the_pace_away() -> None:
    clock, generator = StepClock(), random.Random(3)
    clock.record(33, 0, 3.0)
    for _ in range(3000):
        number = generator.choice([1, 1, 1, 9])
        clock.record(number, 0, (1.0 if number == 1 else 1.5) * generator.gauss(1.0, 0.1))
    assert clock.estimate(33) == pytest.approx(3.0, rel=0.25)
    assert clock.estimate(1) == pytest.approx(1.0, rel=0.1) and clock.estimate(9) == pytest.approx(1.5, rel=0.1)


def test_overhead_is_the_median_of_late() -> None:
    clock = StepClock()
    assert clock.overhead == 0.0
    for seconds in (9.0, 1.0, 2.0):
        clock.record_overhead(seconds)
    assert clock.overhead == 2.0
