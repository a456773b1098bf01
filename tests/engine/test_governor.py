"""The governor: what it believes of a drafter, how many tokens it asks for, when it pauses; then whole runs, simulated."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pitlane import Draft, Limits, Plugin, SamplingParams, Sequence, hookimpl
from pitlane.engine.clock import StepClock
from pitlane.engine.governor import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MARGIN,
    SIZES,
    TRIAL_SIZE,
    TRIAL_STEPS,
    Drafting,
    choose,
)
from pitlane.engine.registry import PluginRegistry


def clock_of(seconds: Callable[[int], float], draft_seconds: float = 0.0) -> StepClock:
    """A clock that has seen every size up to 130."""
    clock = StepClock()
    for number in range(1, 131):
        clock.record(number, 0, seconds(number))
    clock.record_draft("drafter", 1, draft_seconds)
    return clock


def flat(number: int) -> float:
    return 1.0


def line(slope: float) -> Callable[[int], float]:
    return lambda number: 1.0 + slope * (number - 1)


def believed(rate: float) -> Drafting:
    """A drafter that has been seen long enough."""
    return Drafting(accepted=10 * rate, tried=10, steps_left=0)


def ask(drafting: Drafting, clock: StepClock, limit: int = 64, num_tokens: int = 100, others: int = 1) -> int:
    return choose(drafting, "drafter", clock, others, limit, num_tokens)


def chain(number: int) -> Draft:
    return Draft([0] * number)


# ---- what is believed


def test_a_new_drafter_gets_the_benefit_of_the_doubt() -> None:
    drafting = Drafting()
    assert 0.5 < drafting.rate < 1
    assert drafting.reason is None and drafting.steps_left == TRIAL_STEPS


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("number", [1, 4, 16])
def test_acceptance_is_learnt_from_drafts_of_any_length(rate: float, number: int) -> None:
    """Only tokens up to the first miss were tested; counting the rest would call long drafts bad."""
    generator = random.Random(f"{rate} {number}")
    drafting, found = Drafting(), []
    for _ in range(4000):
        accepted = 0
        while accepted < number and generator.random() < rate:
            accepted += 1
        drafting.saw(chain(number), accepted)
        found.append(drafting.rate)
    mean = sum(found[100:]) / len(found[100:])
    assert mean == pytest.approx(rate, abs=0.06)


def test_acceptance_follows_a_change() -> None:
    drafting = Drafting()
    for _ in range(40):
        drafting.saw(chain(4), 4)
    assert drafting.rate > 0.97
    for _ in range(30):
        drafting.saw(chain(4), 0)
    assert drafting.rate < 0.2
    for _ in range(30):
        drafting.saw(chain(4), 4)
    assert drafting.rate > 0.9


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_expected_tokens_of_a_chain_are_a_geometric_sum(rate: float) -> None:
    drafting = believed(rate)
    for number in (0, 1, 2, 7):
        assert drafting.expected(number) == pytest.approx(sum(rate**i for i in range(number + 1)))
    assert 0 < believed(1.0).expected(5) <= 6, "certainty divides by no zero"


def test_of_trees_the_gain_itself_is_kept() -> None:
    """Of twelve nodes three are accepted: no chain of twelve is meant, and half of the tree is half of the gain."""
    drafting = Drafting()
    tree = Draft([0] * 12, [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    for _ in range(30):
        drafting.saw(tree, 3)
    assert drafting.expected(12) == pytest.approx(4.0)
    assert drafting.expected(6) == pytest.approx(2.5)
    assert drafting.expected(100) == pytest.approx(4.0), "there is no more to it"
    for _ in range(60):
        drafting.saw(tree, 0)
    assert drafting.expected(12) < 1.1


# ---- how many


def test_more_are_asked_for_the_more_are_accepted() -> None:
    clock = clock_of(line(0.1))
    found = [ask(believed(rate), clock) for rate in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
    assert found == sorted(found)
    assert found[0] <= 1 < found[2] < found[-1]


def test_fewer_are_asked_for_the_more_they_cost() -> None:
    for clocks in (
        [clock_of(line(slope)) for slope in (0.0, 0.02, 0.1, 0.3, 2.0)],
        [clock_of(line(0.01), seconds) for seconds in (0.0, 0.02, 0.1, 0.3, 2.0)],
    ):
        found = [ask(believed(0.8), clock) for clock in clocks]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[2] > found[-1] == 0


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("slope", [0.02, 0.1])
def test_the_number_is_the_best_of_the_sizes(rate: float, slope: float) -> None:
    drafting, seconds = believed(rate), line(slope)

    def speed(number: int) -> float:
        return drafting.expected(number) / (seconds(number + 1) + 0.03 * number)

    best = max(SIZES, key=speed)
    assert ask(believed(rate), clock_of(seconds, 0.03)) == (best if speed(best) >= MARGIN else 0)


def test_a_step_that_is_wide_anyway_makes_drafts_dear_or_cheap() -> None:
    """Steps of up to 8 tokens take the same; beyond, each token costs. Beside 7 others a draft is dear."""
    clock = clock_of(lambda number: 1.0 + 0.6 * max(0, number - 8))
    assert ask(believed(0.6), clock, others=1) == 6
    assert ask(believed(0.6), clock, others=8) == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_where_nothing_is_allowed_nothing_is_asked_for_and_nothing_is_learnt(limit: int) -> None:
    drafting = Drafting()
    assert ask(drafting, clock_of(flat), limit=limit) == 0
    assert drafting == Drafting()


def test_a_limit_is_kept() -> None:
    for limit in (1, 3, 7, 9, 50):
        assert ask(believed(0.99), clock_of(flat), limit=limit) == limit


def test_before_any_step_was_timed_all_is_asked_for() -> None:
    assert ask(Drafting(), StepClock(), limit=9) == 9


def test_what_a_drafter_cannot_give_is_not_reckoned_with() -> None:
    """A drafter that gives at most 5 is asked for about that many, also where 64 would be best; if it gives more, for more."""
    clock, drafting = clock_of(line(0.001)), believed(0.99)
    assert ask(drafting, clock) == 64
    drafting.saw(chain(5), 5)
    assert ask(drafting, clock) == 5
    drafting.saw(chain(5), 5)
    assert ask(drafting, clock) == 10
    drafting.saw(chain(10), 10)
    assert ask(drafting, clock) == 20


# ---- pauses


def lose(drafting: Drafting, clock: StepClock, num_tokens: int) -> int:
    """Steps with drafts that are never accepted, until it is paused; the number of them."""
    steps = 0
    while (number := ask(drafting, clock, num_tokens=num_tokens)) > 0:
        drafting.saw(chain(number), 0)
        steps += 1
        assert steps < 100
    return steps


def test_a_loser_is_paused_after_its_trial_and_the_reason_is_said() -> None:
    drafting, clock = Drafting(), clock_of(line(0.3))
    assert TRIAL_STEPS <= lose(drafting, clock, 100) <= 2 * TRIAL_STEPS
    assert drafting.resumes_at == 100 + FIRST_PAUSE
    assert drafting.reason is not None and "draft tokens were to yield" in drafting.reason
    assert "plain steps" in drafting.reason


def test_a_trial_of_what_seems_to_lose_is_small() -> None:
    drafting = Drafting(accepted=0.0, tried=10.0)
    assert 0 < ask(drafting, clock_of(line(0.5))) <= TRIAL_SIZE


def test_a_pause_ends_with_a_probe_and_doubles_with_each_that_fails() -> None:
    drafting, clock = Drafting(), clock_of(line(0.3))
    at, pauses = 100, []
    lose(drafting, clock, at)
    for _ in range(8):
        assert ask(drafting, clock, num_tokens=drafting.resumes_at - 1) == 0
        pauses.append(drafting.resumes_at - at)
        at = drafting.resumes_at
        assert lose(drafting, clock, at) == 1, "one probe"
    assert pauses == [min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(8)]
    assert pauses[-1] == LONGEST_PAUSE


def test_a_probe_that_wins_ends_the_pause_and_the_next_one_is_short_again() -> None:
    drafting, clock = Drafting(), clock_of(line(0.1))
    lose(drafting, clock, 100)
    lose(drafting, clock, drafting.resumes_at)
    for step in range(30):  # from now on all is accepted: probes succeed in the end
        at = drafting.resumes_at + step
        number = ask(drafting, clock, num_tokens=at)
        if number:
            drafting.saw(chain(number), number)
    assert drafting.reason is None and drafting.rate > 0.8
    assert ask(drafting, clock, num_tokens=10_000) >= 6
    assert drafting.pause == FIRST_PAUSE
    lose(drafting, clock, 20_000)
    assert drafting.resumes_at == 20_000 + FIRST_PAUSE


def test_a_probe_that_finds_nothing_to_draft_waits_for_the_next_step() -> None:
    drafting, clock = Drafting(), clock_of(line(0.3))
    lose(drafting, clock, 100)
    at = drafting.resumes_at
    for step in range(5):  # no draft came, so `saw` is not called
        assert ask(drafting, clock, num_tokens=at + step) > 0
    assert lose(drafting, clock, at + 5) == 1


def test_a_limit_of_nothing_does_not_use_up_a_probe() -> None:
    drafting, clock = Drafting(), clock_of(line(0.3))
    lose(drafting, clock, 100)
    at = drafting.resumes_at
    assert ask(drafting, clock, limit=0, num_tokens=at) == 0 and drafting.reason is not None
    assert ask(drafting, clock, num_tokens=at) > 0 and drafting.reason is None


def test_trees_that_lose_are_paused_too() -> None:
    drafting, clock = Drafting(), clock_of(line(0.2))
    for _ in range(3 * TRIAL_STEPS):
        if ask(drafting, clock) == 0:
            break
        drafting.saw(Draft([0] * 8, [-1, -1, 0, 0, 1, 1, 2, 2]), 0)
    assert drafting.reason is not None


# ---- whole runs


@dataclass(slots=True)
class Case:
    """A drafter and a machine. rate: acceptance of a token; slope: of a step's time per token; draft: time of one drafted."""

    rate: float
    slope: float
    draft: float
    most: int = 16  # tokens that the drafter gives at most
    first: float = 0.0  # time that its first draft takes besides: a draft model reads the prompt

    def __str__(self) -> str:
        return f"rate {self.rate}, slope {self.slope}, draft {self.draft}"


def simulate(case: Case, num_tokens: int, fixed: int | None = None, seed: int = 0, noise: float = 0.05) -> float:
    """Seconds for an answer, by the governor or with a fixed number of draft tokens; a plain step takes 1 second."""
    generator, drafting, clock = random.Random(seed), Drafting(), StepClock()
    clock.record(128, 128, line(case.slope)(128))
    clock.record(1, 0, 1.0)
    done, total = 0, 0.0
    while done < num_tokens:
        limit = min(64, num_tokens - done - 1)
        number = choose(drafting, "drafter", clock, 1, limit, 100 + done) if fixed is None else min(fixed, limit)
        number = min(number, case.most)
        accepted = 0
        while accepted < number and generator.random() < case.rate:
            accepted += 1
        forward = line(case.slope)(1 + number) * generator.uniform(1 - noise, 1 + noise)
        drafted = number * case.draft * generator.uniform(1 - noise, 1 + noise)
        clock.record(1 + number, 0, forward)
        if number and drafting.longest == 0:
            drafted += case.first
        clock.record_draft("drafter", number, drafted)
        if number:
            drafting.saw(chain(number), accepted)
        total += forward + drafted
        done += accepted + 1
    return total


LOSERS = [
    Case(0.0, 0.02, 0.0),
    Case(0.0, 0.1, 0.01),
    Case(0.05, 0.05, 0.1),
    Case(0.1, 0.02, 0.15),
    Case(0.3, 0.05, 0.3),
]
WINNERS = [
    Case(0.9, 0.01, 0.0),
    Case(0.9, 0.02, 0.1),
    Case(0.7, 0.02, 0.05),
    Case(0.6, 0.05, 0.0),
    Case(0.98, 0.005, 0.01),
    Case(0.8, 0.1, 0.02),
    Case(0.8, 0.02, 0.1, first=20.0),
]
RUNS = 20


@pytest.mark.parametrize("case", LOSERS, ids=str)
def test_a_drafter_that_loses_costs_less_than_two_percent(case: Case) -> None:
    plain = sum(simulate(case, 512, fixed=0, seed=seed) for seed in range(RUNS))
    best = min(sum(simulate(case, 512, fixed=number, seed=seed) for seed in range(RUNS)) for number in (1, 2, 4, 8))
    assert best > 0.99 * plain, "no number of draft tokens helps: this is a loser"
    governed = sum(simulate(case, 512, seed=seed) for seed in range(RUNS))
    assert governed < 1.02 * plain, f"costs {100 * (governed / plain - 1):.2f} %"


@pytest.mark.parametrize("case", WINNERS, ids=str)
def test_a_drafter_that_wins_reaches_the_best_fixed_number(case: Case) -> None:
    sizes = [size for size in SIZES if size <= case.most]
    best = min(sum(simulate(case, 512, fixed=size, seed=seed) for seed in range(RUNS)) for size in (0, *sizes))
    governed = sum(simulate(case, 512, seed=seed) for seed in range(RUNS))
    assert best < 0.9 * 512 * RUNS, "this is a winner"
    assert best / governed >= 0.95, f"reaches {100 * best / governed:.1f} % of the best"


# ---- in the engine


class Hopeless(Plugin):
    """Drafts what is never right, and takes its time."""

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


def test_a_loser_is_paused_in_the_engine_and_the_stats_say_so(make_engine: Any) -> None:
    registry = PluginRegistry.load()
    registry.add(Hopeless)
    engine = make_engine(registry=registry)
    params = SamplingParams(max_tokens=128, ignore_eos=True)
    prompt = [random.Random(3).randrange(256) for _ in range(40)]
    plan = engine.plan({"hopeless": {}})
    plain, found = engine.generate(prompt, params), engine.generate(prompt, params, plan=plan)
    assert found.token_ids == plain.token_ids
    assert plain.stats["paused"] == {}
    assert "plain steps" in found.stats["paused"]["hopeless"]
    assert TRIAL_STEPS <= len(plan.plugins[0].asked) < 2 * TRIAL_STEPS + 8, "then only probes, where it is asked at all"
    assert all(0 < number <= 64 for number in plan.plugins[0].asked)
