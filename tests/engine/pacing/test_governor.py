"""The governor: what it believes of a drafter, how many tokens it asks for, when it pauses; then whole runs, simulated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from pitlane import Draft, Limits, Plugin, PluginOptions, SamplingParams, Sequence, hookimpl
from pitlane.engine.pacing.belief import (
    CREDIT,
    FIRST_PAUSE,
    LANE_DECAY,
    PRIOR_STEPS,
    TRIAL_STEPS,
    Belief,
    Drafting,
    Record,
)
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.pacing.governor import (
    CALIBRATED,
    CREDIT_PER_STEP,
    FIRST_SIZE,
    LONGEST_PAUSE,
    PROBE_STEPS,
    STANDS,
    TRIAL_SIZE,
    Governor,
)
from pitlane.engine.plan.registry import PluginRegistry

TREE = [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def clock_of(seconds: Callable[[int], float]) -> StepClock:
    """A clock that has seen every size up to 700."""
    clock = StepClock()
    for number in range(1, 701):
        clock.record(number, 0, seconds(number))
    return clock


def flat(number: int) -> float:
    return 1.0


def line(slope: float) -> Callable[[int], float]:
    return lambda number: 1.0 + slope * (number - 1)


def believed(rate: float) -> Belief:
    """Of a drafter that has been seen long enough."""
    return Belief(accepted=10 * rate, tried=10, num_drafts=10)


def chain(number: int) -> Draft:
    return Draft([0] * number)


@dataclass(slots=True)
class Seq:
    """What the governor sees of a sequence."""

    num_tokens: int = 100
    drafting: Drafting | None = None
    draft: Draft | None = None


class Lane:
    """A governor and sequences that decode, one scheduled token each; steps are driven by hand."""

    def __init__(self, clock: StepClock, num_seqs: int = 1, known: bool = True, per_token: float = 0.0) -> None:
        self.governor = Governor(clock, 512)
        self.drafter = cast(Any, Hopeless())
        self.seqs = [Seq() for _ in range(num_seqs)]
        if known:  # that the drafter gives up to 64 tokens
            self.governor.records[self.drafter] = Record(longest=63, is_longest=True, steps_left=0)
            self.record.draft_seconds += [per_token] * 2

    @property
    def record(self) -> Record:
        return self.governor.records[self.drafter]

    def believe(self, belief: Belief, steps_left: int = 0) -> Lane:
        """Of all sequences, and of the lane's as a whole."""
        self.record.belief = replace(belief, decay=LANE_DECAY)
        for seq in self.seqs:
            seq.drafting = Drafting(belief.inherited(), steps_left)
            seq.drafting.belief = belief
        return self

    def ask(self, limit: int = 64, others: int = 0) -> list[int]:
        number = len(self.seqs)
        self.governor.start_step(number + others, number)
        return self.governor.ask(self.drafter, cast(Any, self.seqs), [limit] * number)

    def step(
        self, accept: Callable[[int], int], most: int = 64, seconds: float = 0.0, parents: bool = False
    ) -> list[int]:
        """Ask, draft, verify: `accept(number)` of each draft; what was asked for."""
        numbers = self.ask()
        for seq, number in zip(self.seqs, numbers, strict=True):
            number = min(number, most)
            seq.draft = Draft([0] * number, TREE[:number] if parents else None) if number else None
        if any(numbers):  # as in the loop: who is not asked drafts nothing
            self.governor.drafted(self.drafter, cast(Any, self.seqs), seconds)
        for seq in self.seqs:
            accepted = accept(len(seq.draft.token_ids)) if seq.draft else 0
            if seq.draft is not None:
                self.governor.verified(self.drafter, cast(Any, seq), seq.draft, accepted)
            seq.draft = None
            seq.num_tokens += 1 + accepted
        return numbers

    @property
    def drafting(self) -> Drafting:
        assert self.seqs[0].drafting is not None
        return self.seqs[0].drafting


def none(number: int) -> int:
    return 0


def test_reading_a_prompt_first_is_charged_though_it_is_no_price_of_a_token() -> None:
    lane = Lane(clock_of(flat)).believe(believed(0.9))
    prices = list(lane.record.draft_seconds)
    assert lane.drafting.is_behind and lane.step(none, seconds=2.0)[0] > 0
    assert lane.record.credit == pytest.approx(CREDIT - 2.0), "two plain steps"
    assert list(lane.record.draft_seconds) == prices
    lane.believe(believed(0.9)).drafting.is_behind = False
    number = lane.step(none, seconds=0.5)[0]
    assert lane.record.credit == pytest.approx(CREDIT - 2.0 + CREDIT_PER_STEP)
    assert lane.record.draft_seconds[-1] == pytest.approx(0.5 / number)


# ---- what is believed


def test_a_new_drafter_gets_the_benefit_of_the_doubt() -> None:
    drafting = Drafting()
    assert 0.5 < drafting.belief.rate < 1
    assert drafting.reason is None and drafting.steps_left == TRIAL_STEPS


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("number", [1, 4, 16])
def test_acceptance_is_learnt_from_drafts_of_any_length(rate: float, number: int) -> None:
    """Only tokens up to the first miss were tested; counting the rest would call long drafts bad."""
    generator = random.Random(f"{rate} {number}")
    belief, found = Belief(), []
    for _ in range(4000):
        accepted = 0
        while accepted < number and generator.random() < rate:
            accepted += 1
        belief.saw(chain(number), accepted)
        found.append(belief.rate)
    mean = sum(found[100:]) / len(found[100:])
    assert mean == pytest.approx(rate, abs=0.06)


def test_acceptance_follows_a_change() -> None:
    belief = Belief()
    for _ in range(40):
        belief.saw(chain(4), 4)
    assert belief.rate > 0.97
    for _ in range(30):
        belief.saw(chain(4), 0)
    assert belief.rate < 0.2
    for _ in range(30):
        belief.saw(chain(4), 4)
    assert belief.rate > 0.9


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_expected_tokens_of_a_chain_are_a_geometric_sum(rate: float) -> None:
    belief = believed(rate)
    for number in (0, 1, 2, 7):
        assert belief.expected(number) == pytest.approx(sum(rate**i for i in range(1, number + 1)))
    assert 4.9 < believed(1.0).expected(5) <= 5


def test_of_trees_the_gain_itself_is_kept() -> None:
    """Of twelve nodes three are accepted: no chain of twelve is meant, and half of the tree is half of the gain."""
    belief = Belief()
    for _ in range(30):
        belief.saw(Draft([0] * 12, TREE), 3)
    assert belief.expected(12) == pytest.approx(3.0)
    assert belief.expected(6) == pytest.approx(1.5)
    assert belief.expected(100) == pytest.approx(3.0), "there is no more to it"
    (gain,), (size,) = belief.gains(100)
    assert (gain, size) == pytest.approx((3.0, 12.0)), "one part, and more does not take longer"
    for _ in range(60):
        belief.saw(Draft([0] * 12, TREE), 0)
    assert belief.expected(12) < 0.1


def test_of_a_drafter_that_gives_trees_chains_count_too() -> None:
    """A tree with one branch is a chain; one that gives trees at times must not live on those alone."""
    belief = Belief()
    belief.saw(Draft([0] * 12, TREE), 3)
    for _ in range(40):
        belief.saw(chain(12), 0)
    assert belief.is_tree and belief.expected(12) < 0.1


@pytest.mark.parametrize("parents", [None, TREE])
def test_what_is_inherited_says_the_same_and_weighs_little(parents: list[int] | None) -> None:
    belief = Belief(decay=LANE_DECAY)
    for _ in range(200):
        belief.saw(Draft([0] * 12, parents), 3)
    heir = belief.inherited()
    assert [heir.expected(n) for n in (1, 5, 12)] == pytest.approx([belief.expected(n) for n in (1, 5, 12)])
    assert heir.tried <= PRIOR_STEPS and heir.num_drafts <= PRIOR_STEPS
    for _ in range(2):
        heir.saw(Draft([0] * 12, parents), 12)
        belief.saw(Draft([0] * 12, parents), 12)
    assert heir.expected(12) > 1.4 * belief.expected(12)
    assert Belief().inherited() == Belief()


# ---- how many


def choice(belief: Belief, clock: StepClock, **options: Any) -> int:
    per_token = options.pop("per_token", 0.0)
    (number,) = Lane(clock, per_token=per_token).believe(belief).ask(**options)
    return number


def test_more_are_asked_for_the_more_are_accepted() -> None:
    clock = clock_of(line(0.1))
    found = [choice(believed(rate), clock) for rate in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
    assert found == sorted(found)
    assert found[0] <= 1 < found[2] < found[-1]


def test_fewer_are_asked_for_the_more_they_cost() -> None:
    costs = [0.0, 0.02, 0.1, 0.3, 2.0]
    for found in (
        [choice(believed(0.8), clock_of(line(slope))) for slope in costs],
        [choice(believed(0.8), clock_of(line(0.01)), per_token=seconds) for seconds in costs],
    ):
        assert found == sorted(found, reverse=True)
        assert found[0] > found[2] > found[-1] == 0


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("slope", [0.02, 0.1])
@pytest.mark.parametrize("overhead", [0.0, 0.5])
def test_the_number_is_the_best_of_the_sizes(rate: float, slope: float, overhead: float) -> None:
    belief, clock = believed(rate), clock_of(line(slope))
    clock.record_overhead(overhead)

    def speed(number: int) -> float:
        return (1 + belief.expected(number)) / (overhead + line(slope)(number + 1) + 0.03 * number)

    best = max(range(1, 65), key=speed)
    assert choice(believed(rate), clock, per_token=0.03) == (best if speed(best) * (1 + overhead) >= 1.02 else 0)


def test_a_step_that_is_wide_anyway_makes_drafts_dear_or_cheap() -> None:
    """Steps of up to 8 tokens take the same; beyond, each token costs. Beside 7 others a draft is dear."""
    clock = clock_of(lambda number: 1.0 + 0.6 * max(0, number - 8))
    assert choice(believed(0.6), clock) == 7
    assert choice(believed(0.6), clock, others=7) == 0


@pytest.mark.parametrize("num_seqs", [16, 64])
def test_in_a_batch_a_draft_for_one_costs_all(num_seqs: int) -> None:
    """A draft that takes a tenth of a step pays for one sequence alone, and loses where sixteen wait for it."""
    dear = clock_of(line(0.1))
    assert choice(believed(0.5), dear) >= 1
    assert Lane(dear, num_seqs).believe(believed(0.5)).ask() == [0] * num_seqs
    cheap = Lane(clock_of(line(0.001)), num_seqs).believe(believed(0.3)).ask()
    assert min(cheap) > 0, "the gain of one is little of the step's, and so is its cost"


@pytest.mark.parametrize("limit", [0, -1])
def test_where_nothing_is_allowed_nothing_is_asked_for_and_nothing_is_learnt(limit: int) -> None:
    lane = Lane(clock_of(flat), known=False)
    assert lane.ask(limit=limit) == [0]
    assert lane.seqs[0].drafting is None and lane.record == Record(turn=1)


def test_limits_are_kept() -> None:
    for limit in (1, 3, 7, 9, 50):
        assert choice(believed(0.99), clock_of(flat), limit=limit) == limit


def test_drafts_fit_into_a_step_with_all_else() -> None:
    lane = Lane(clock_of(flat), 16).believe(believed(0.99))
    numbers = lane.ask(others=300)
    assert sum(numbers) == 512 - 316 and numbers[0] == 64 and numbers[-1] == 0
    assert lane.ask(others=600) == [0] * 16


def test_a_new_drafter_shows_what_it_gives_on_one_sequence_after_another() -> None:
    """None of it is paid by sixteen at once, and one that finds nothing does not keep the others from drafting."""
    lane = Lane(clock_of(line(1.0)), 3, known=False)
    assert [lane.step(none, most=0) for _ in range(4)] == [
        [FIRST_SIZE, 0, 0],
        [0, FIRST_SIZE, 0],
        [0, 0, FIRST_SIZE],
        [FIRST_SIZE, 0, 0],
    ]


def test_before_any_step_was_timed_all_is_asked_for() -> None:
    assert Lane(StepClock(), known=False).ask(limit=7) == [7]


def test_what_a_drafter_cannot_give_is_not_reckoned_with() -> None:
    """A drafter that gives at most 5 is asked for one more, lest it might; if it gives that, for twice as much."""
    lane = Lane(clock_of(line(0.0001)), known=False)
    assert [lane.step(lambda number: number, most=5)[0] for _ in range(4)] == [FIRST_SIZE, TRIAL_SIZE, 6, 6]
    assert [lane.step(lambda number: number)[0] for _ in range(4)] == [6, 12, 24, 48]
    assert lane.step(lambda number: number, most=3)[0] == 64
    assert lane.record.most == 49
    assert lane.ask(limit=2) == [2]


def test_a_tree_grows_until_it_is_whole() -> None:
    lane = Lane(clock_of(line(0.0001)), known=False)
    TREE.extend(range(-1, 40)[len(TREE) :])
    del TREE[40:]
    assert [lane.step(lambda number: number // 4, most=28, parents=True)[0] for _ in range(5)] == [8, 8, 16, 32, 29]
    del TREE[12:]


def test_what_was_asked_for_and_did_not_come_is_not_computed() -> None:
    """Two drafters in one step: the second one's drafts are reckoned beside the first one's as they are."""
    lane = Lane(clock_of(line(0.01)), 4).believe(believed(0.8))
    numbers = lane.ask()
    governor, step = lane.governor, lane.governor.step
    assert step.num_tokens == 4 + sum(numbers)
    lane.seqs[0].draft = chain(3)
    governor.drafted(lane.drafter, cast(Any, lane.seqs), 0.25)
    assert (governor.step.num_tokens, governor.step.seconds) == (7, 0.25)
    assert governor.step.num_expected == pytest.approx(4 + believed(0.8).expected(3))
    other, seq = Hopeless(), Seq(drafting=Drafting(believed(0.8), 0))
    governor.records[cast(Any, other)] = Record(longest=10)
    assert governor.ask(cast(Any, other), [cast(Any, seq)], [8])[0] > 0
    governor.drafted(cast(Any, other), [cast(Any, seq)], 0.5)
    assert (governor.step.num_tokens, governor.step.seconds) == (7, 0.75)
    assert governor.records[cast(Any, other)].per_token == 0.0, "no draft says nothing of a token's time"


def test_a_draft_that_took_in_a_prompt_tells_nothing_of_the_next() -> None:
    lane = Lane(clock_of(line(0.01)), known=False)
    assert lane.step(lambda number: number, most=4, seconds=500.0)[0] > 0
    assert lane.record.per_token == 0.0
    assert lane.step(lambda number: number, most=4, seconds=2.0)[0] > 0
    assert lane.record.per_token == 0.5
    lane.seqs = [Seq()]
    lane.step(lambda number: number, most=4, seconds=500.0)
    assert lane.record.per_token == 0.5, "nor does another sequence's first one"


def test_drawing_a_token_for_every_row_costs_too() -> None:
    record = Record()
    record.draft_seconds.append(1.0)
    record.row_seconds += [0.5, 0.25, 0.5]
    assert record.per_token == 1.5
    record.draft_seconds.extend([2.0] * 9)
    assert record.per_token == 2.5, "old drafts are forgotten"


# ---- from sequence to sequence


def test_a_new_sequence_begins_with_what_the_lane_knows() -> None:
    lane = Lane(clock_of(line(0.1)), known=False)
    for _ in range(60):
        lane.step(none, most=8)
    lane.record.credit = CREDIT
    lane.seqs = [Seq()]
    assert 0 < lane.step(none)[0] <= TRIAL_SIZE, "one probe, of a drafter that does not promise anything"
    assert lane.ask() == [0] and lane.drafting.reason is not None
    for _ in range(60):
        lane.seqs = [Seq()]
        lane.step(lambda number: number, most=8)
    lane.seqs = [Seq()]
    assert lane.ask()[0] >= 8, "and at once all that pays, where others were served well"


def test_drafters_are_known_apart_and_forgotten_with_their_plugin() -> None:
    lane = Lane(clock_of(line(0.1)))
    governor, other = lane.governor, Hopeless()
    assert governor.ask(cast(Any, other), [cast(Any, Seq())], [7]) == [7]
    assert len(governor.records) == 2
    del other
    assert list(governor.records) == [lane.drafter]


# ---- pauses


def lose(lane: Lane) -> int:
    """Steps with drafts that are never accepted, until it is paused; the number of them."""
    steps = 0
    while lane.step(none, most=8)[0] > 0:
        steps += 1
        assert steps < 100
    return steps


def skip(lane: Lane) -> None:
    """Time passes without a step with drafts, until the next probe."""
    lane.seqs[0].num_tokens = lane.drafting.resumes_at
    lane.record.credit = CREDIT


def test_a_loser_is_paused_after_its_trial_and_the_reason_is_said() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    assert TRIAL_STEPS <= lose(lane) <= 2 * TRIAL_STEPS
    assert lane.drafting.resumes_at == lane.seqs[0].num_tokens - 1 + FIRST_PAUSE
    assert lane.drafting.reason is not None
    assert (
        lane.drafting.reason.startswith("drafts cost more than they saved (") and "plain steps" in lane.drafting.reason
    )


def test_a_dear_trial_is_short() -> None:
    lane = Lane(clock_of(line(0.8)), known=False)
    assert 1 <= lose(lane) < TRIAL_STEPS
    assert -CREDIT <= lane.record.credit < 0


def test_a_trial_of_what_seems_to_lose_is_small() -> None:
    assert Lane(clock_of(line(0.3))).believe(believed(0.0), steps_left=1).ask()[0] <= TRIAL_SIZE
    tree = Belief(num_drafts=10, offered=300, is_tree=True)
    assert Lane(clock_of(line(0.01))).believe(tree, steps_left=1).ask() == [64], "of trees, all or nothing"


def test_a_pause_ends_with_a_probe_and_doubles_with_each_that_fails() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    lose(lane)
    pauses = []
    for _ in range(8):
        at = lane.seqs[0].num_tokens - 1
        pauses.append(lane.drafting.resumes_at - at)
        lane.seqs[0].num_tokens = lane.drafting.resumes_at - 1
        assert lane.ask() == [0]
        skip(lane)
        assert lose(lane) == PROBE_STEPS
    assert pauses == [min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(8)]
    assert pauses[-1] == LONGEST_PAUSE


def test_a_probe_that_wins_ends_the_pause_and_the_next_one_is_short_again() -> None:
    lane = Lane(clock_of(line(0.1)), known=False)
    lose(lane)
    skip(lane)
    lose(lane)
    skip(lane)
    numbers = [lane.step(lambda number: number)[0] for _ in range(4)]  # from now on all is accepted
    assert min(numbers) > 0 and numbers[-1] > TRIAL_SIZE, "one probe shows it: what was before the pause weighs little"
    assert lane.drafting.reason is None and lane.drafting.pause == FIRST_PAUSE
    lose(lane)
    assert lane.drafting.resumes_at == lane.seqs[0].num_tokens - 1 + FIRST_PAUSE


def test_a_probe_that_finds_nothing_to_draft_waits_for_the_next_step() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    lose(lane)
    skip(lane)
    for _ in range(5):
        assert lane.step(none, most=0)[0] > 0
    assert lose(lane) == PROBE_STEPS


def test_a_limit_of_nothing_does_not_use_up_a_probe() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    lose(lane)
    skip(lane)
    assert lane.ask(limit=0) == [0] and lane.drafting.reason is not None
    assert lane.ask()[0] > 0 and lane.drafting.reason is None


def test_a_probe_that_cannot_be_paid_waits_until_it_can() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    lose(lane)
    lane.seqs[0].num_tokens = lane.drafting.resumes_at
    lane.record.credit, pause = 0.0, lane.drafting.pause
    waited = 0
    while lane.step(none) == [0]:
        waited += 1
        assert waited < 100
    dearest = (line(0.05)(1 + TRIAL_SIZE) - 1) / CREDIT_PER_STEP
    assert 0.2 * dearest < waited <= dearest + 1
    assert lane.drafting.pause == pause, "to wait is not to fail"


def test_sequences_pay_their_trials_from_one_purse() -> None:
    lane = Lane(clock_of(lambda number: 1 + 0.25 * max(0, number - 16)), 16).believe(believed(0.0), TRIAL_STEPS)
    asked = [number for number in lane.ask() if number]
    assert sum(0.25 * number for number in asked) <= CREDIT < 16 * 0.25
    lane.record.credit = 0.0
    assert lane.ask() == [0] * 16


def test_what_drafts_gain_is_credit_for_trials_up_to_a_bound() -> None:
    lane = Lane(clock_of(line(0.01))).believe(believed(0.9))
    lane.record.credit = 0.0
    lane.step(lambda number: 1)
    assert 0 < lane.record.credit < 1
    for _ in range(20):
        lane.step(lambda number: number)
    assert lane.record.credit == CREDIT


def test_trees_that_lose_are_paused_too() -> None:
    lane = Lane(clock_of(line(0.02)), known=False)
    for _ in range(3 * TRIAL_STEPS):
        if lane.step(none, most=8, parents=True) == [0]:
            break
    assert lane.drafting.belief.is_tree and lane.drafting.reason is not None


# ---- searches that find nothing


def search(lane: Lane, seconds: float, steps: int) -> list[bool]:
    """Whether the drafter was asked in each of so many steps; it takes `seconds` and finds no draft."""
    return [lane.step(none, most=0, seconds=seconds)[0] > 0 for _ in range(steps)]


@pytest.mark.parametrize("known", [False, True], ids=["it never gave a draft", "it gave drafts before"])
def test_a_slow_search_that_finds_nothing_is_paused_at_once_and_the_reason_is_said(known: bool) -> None:
    lane = Lane(clock_of(flat), known=known)
    asked = search(lane, 100.0, 2000)
    assert asked[:3] == [True, True, False], "the first search may build an index; the second one shows the price"
    assert sum(asked) <= 6
    assert lane.drafting.reason is not None
    assert "its own work took 100000.0 ms a step, the time of 100.00 plain steps" in lane.drafting.reason


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.3, 2.0])
def test_searches_cost_little_more_than_a_step_earns(seconds: float) -> None:
    lane = Lane(clock_of(flat), known=False)
    search(lane, seconds, 500)
    assert seconds * sum(search(lane, seconds, 3000)) <= 3000 * CREDIT_PER_STEP + CREDIT


def test_a_cheap_search_is_never_paused() -> None:
    lane = Lane(clock_of(flat), known=False)
    assert all(search(lane, CREDIT_PER_STEP, 2000)) and lane.record.credit <= CREDIT
    lane.record.credit = -CREDIT
    assert all(search(lane, CREDIT_PER_STEP, 50)), "however much it lost with drafts"


def test_an_index_that_is_built_once_is_no_price_of_a_search() -> None:
    lane = Lane(clock_of(flat), known=False)
    assert search(lane, 20.0, 1) == [True]
    assert all(search(lane, 0.001, 500)) and lane.record.credit > CREDIT - 0.01


def test_a_pause_of_searches_ends_when_the_next_is_paid_for() -> None:
    lane = Lane(clock_of(flat), known=False)
    assert not search(lane, 100.0, 3)[-1]
    wait = lane.drafting.resumes_at - lane.seqs[0].num_tokens + 1
    assert wait == pytest.approx(2 * CREDIT / CREDIT_PER_STEP, abs=2)
    assert not any(search(lane, 100.0, wait - 2))
    numbers = [lane.step(lambda number: number)[0] for _ in range(8)]
    assert all(numbers[4:]) and lane.drafting.reason is None, "it is asked once more, finds a draft, and goes on"


# ---- whole runs


@dataclass(slots=True)
class Case:
    """A drafter and a machine.

    rate: acceptance of a token; slope: of a step's time per token, beyond `free` tokens; draft: time of one drafted token.
    """

    rate: float
    slope: float
    draft: float
    free: int = 1
    most: int = 16  # tokens that the drafter gives at most
    first: float = 0.0  # time that the first draft for a sequence takes besides: a draft model reads the prompt
    num_seqs: int = 1
    is_tree: bool = False  # gives `most` tokens, of which a share `rate` is accepted in the mean

    def __str__(self) -> str:
        return f"{self.num_seqs} seqs, rate {self.rate}, slope {self.slope}, draft {self.draft}, tree {self.is_tree}"

    def forward(self, number: int) -> float:
        return 1.0 + self.slope * max(0, number - self.free)

    def accepted(self, number: int, generator: random.Random) -> int:
        if self.is_tree:
            return int(number * self.rate + generator.random())
        accepted = 0
        while accepted < number and generator.random() < self.rate:
            accepted += 1
        return accepted


def simulate(case: Case, num_tokens: int, fixed: int | None = None, seed: int = 0, noise: float = 0.05) -> float:
    """Seconds for as many answers as there are sequences side by side, by the governor or with a fixed number of draft tokens.

    Who is done makes room for the next one, so that those who are lucky do not leave the others alone in the batch.
    """
    generator, clock = random.Random(seed), StepClock()

    def about(seconds: float) -> float:
        return seconds * generator.uniform(1 - noise, 1 + noise)

    for number in (case.num_seqs, *CALIBRATED):
        clock.record(number, 0, case.forward(number))
    lane, total = Lane(clock, case.num_seqs, known=False), 0.0
    governor, started, kept = lane.governor, set[int](), list[Seq]()
    seqs, done = lane.seqs, 0
    while done < num_tokens * case.num_seqs:
        limits = [num_tokens - (seq.num_tokens - 100) - 1 for seq in seqs]
        governor.start_step(len(seqs), len(seqs))
        asked = (
            governor.ask(lane.drafter, cast(Any, seqs), limits)
            if fixed is None
            else [min(fixed, limit) for limit in limits]
        )
        drafted = 0.0
        for seq, number in zip(seqs, asked, strict=True):
            number = min(number, case.most)
            parents = [-1] * number if case.is_tree else None
            seq.draft = Draft([0] * number, parents) if number else None
            drafted += about(number * case.draft) + case.first * (number > 0 and id(seq) not in started)
            started |= {id(seq)} if number else set()
        if fixed is None and any(asked):
            governor.drafted(lane.drafter, cast(Any, seqs), drafted)
        size = len(seqs) + sum(len(seq.draft.token_ids) for seq in seqs if seq.draft)
        forward = about(case.forward(size))
        for seq in seqs:
            accepted = case.accepted(len(seq.draft.token_ids), generator) if seq.draft else 0
            if seq.draft is not None and fixed is None:
                governor.verified(lane.drafter, cast(Any, seq), seq.draft, accepted)
            seq.draft = None
            seq.num_tokens += 1 + accepted
            done += 1 + accepted
        clock.record(size, 0, forward)
        total += drafted + forward
        seqs = [seq if seq.num_tokens - 100 < num_tokens else Seq() for seq in seqs]
        kept += seqs
    return total


LOSERS = [
    Case(0.0, 0.02, 0.0),
    Case(0.0, 0.1, 0.01),
    Case(0.0, 0.5, 0.1),
    Case(0.05, 0.05, 0.1),
    Case(0.1, 0.02, 0.15),
    Case(0.3, 0.05, 0.3),
    Case(0.02, 0.1, 0.01, most=28, is_tree=True),
    Case(0.0, 0.02, 0.01, num_seqs=16),
    Case(0.05, 0.07, 0.0, num_seqs=16, free=16),
    Case(0.3, 0.07, 0.1, num_seqs=16, free=16),
    Case(0.0, 0.05, 0.0, num_seqs=16, most=28, is_tree=True),
]
WINNERS = [
    Case(0.9, 0.01, 0.0),
    Case(0.9, 0.02, 0.1),
    Case(0.7, 0.02, 0.05),
    Case(0.6, 0.05, 0.0),
    Case(0.98, 0.005, 0.01),
    Case(0.8, 0.1, 0.02),
    Case(0.8, 0.02, 0.1, first=10.0),
    Case(0.1, 0.02, 0.0, most=28, is_tree=True),
    Case(0.8, 0.01, 0.0, num_seqs=16),
    Case(0.8, 0.05, 0.01, num_seqs=16, free=32),
    Case(0.9, 0.01, 0.01, num_seqs=16, free=16, first=1.0),
]


def seconds(case: Case, fixed: int | None) -> float:
    runs = 4 if case.num_seqs == 1 else 1
    return sum(simulate(case, 512, fixed=fixed, seed=seed) for seed in range(runs)) / runs


@pytest.mark.parametrize("case", LOSERS, ids=str)
def test_a_drafter_that_loses_costs_less_than_two_percent(case: Case) -> None:
    plain = seconds(case, 0)
    best = min(seconds(case, number) for number in ([case.most] if case.is_tree else (1, 2, 4, 8)))
    assert best > 0.99 * plain, "no number of draft tokens helps: this is a loser"
    governed = seconds(case, None)
    assert governed < 1.02 * plain, f"costs {100 * (governed / plain - 1):.2f} %"


@pytest.mark.parametrize("case", WINNERS, ids=str)
def test_a_drafter_that_wins_reaches_the_best_fixed_number(case: Case) -> None:
    sizes = [case.most] if case.is_tree else [size for size in (1, 2, 3, 4, 6, 8, 12, 16) if size <= case.most]
    plain, best = seconds(case, 0), min(seconds(case, size) for size in sizes)
    governed = seconds(case, None)
    assert best < 0.9 * plain, "this is a winner"
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
    asked = plan.plugins[0].asked
    assert 1 <= len(asked) < 2 * TRIAL_STEPS + 8, "then only probes, where it is asked at all"
    assert asked[0] == FIRST_SIZE and all(0 < number <= 64 for number in asked)
    again = engine.generate(prompt, params, plan=plan)
    assert len(plan.plugins[0].asked) - len(asked) <= 4 and "hopeless" in again.stats["paused"], "it is known by now"


class Sleeper(Plugin):
    """Sleeps in one of its hooks, and drafts nothing, or what is never right."""

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


# ---- what a step pays for it


def test_where_nothing_was_found_the_order_stands_and_then_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Lane(clock_of(line(0.01))).believe(believed(0.8))
    made: list[int] = []
    share = Governor._share
    monkeypatch.setattr(Governor, "_share", lambda *args: made.append(lane.seqs[0].num_tokens) or share(*args))
    first = lane.seqs[0].num_tokens
    asked = [lane.step(none, most=0)[0] for _ in range(2 * STANDS)]
    assert set(asked) == {asked[0]} and asked[0] > 0
    assert made == [first, first + STANDS]
    assert lane.step(none, most=0)[0] > 0 and lane.step(none)[0] > 0, "a draft comes"
    made.clear()
    lane.step(none)
    assert len(made) == 1, "and what is believed has changed"


def test_a_standing_order_keeps_within_the_limit() -> None:
    lane = Lane(clock_of(line(0.01))).believe(believed(0.9))
    assert lane.step(none, most=0)[0] > 3
    assert lane.ask(limit=3) == [3]
    assert lane.ask(limit=0) == [0]


def test_steps_with_drafts_are_reckoned_with_what_they_take_besides() -> None:
    lane = Lane(clock_of(line(0.01))).believe(believed(0.4))
    number = lane.ask()[0]
    lane.seqs[0].draft = chain(number)
    lane.governor.drafted(lane.drafter, cast(Any, lane.seqs), 0.0)
    lane.governor.stepped(1.0)  # as long as a plain step's forward
    lane.seqs[0].draft = None
    assert number > 0 and lane.ask() == [0], "two thirds of a token do not pay a second step"


def test_a_step_of_two_drafters_says_nothing_of_either() -> None:
    lane = Lane(clock_of(line(0.01)), 2).believe(believed(0.8))
    other = cast(Any, Hopeless())
    lane.governor.records[other] = Record(longest=10)
    lane.governor.start_step(2, 2)
    for drafter, seq in ((lane.drafter, lane.seqs[0]), (other, lane.seqs[1])):
        lane.governor.ask(drafter, [cast(Any, seq)], [8])
        seq.draft = chain(2)
        lane.governor.drafted(drafter, [cast(Any, seq)], 0.1)
    lane.governor.stepped(3.0)
    assert not lane.record.overheads and not lane.governor.records[other].overheads


def test_who_is_paused_is_not_asked() -> None:
    lane = Lane(clock_of(line(0.05)), known=False)
    assert not lane.governor.is_paused(cast(Any, lane.seqs))
    lose(lane)
    assert lane.governor.is_paused(cast(Any, lane.seqs)) and lane.ask() == [0]
    lane.seqs[0].num_tokens = lane.drafting.resumes_at
    assert not lane.governor.is_paused(cast(Any, lane.seqs))
