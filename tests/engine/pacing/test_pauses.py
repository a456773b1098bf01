"""When pacing pauses a drafter, what it tells the user, and how the drafter comes back."""

from __future__ import annotations

import pytest

from tests.engine.pacing.scenarios import alternates, changes, nowhere, turns
from tests.engine.pacing.simulator import Drafter, Lane, Machine


def asked_places(lane: Lane, seq_id: int = 0) -> list[int]:
    """The places in an answer at which its drafter was asked."""
    return [step.places[seq_id] for step in lane.steps if seq_id in step.asked]


def test_a_drafter_that_is_never_right_is_paused_and_the_reason_is_said() -> None:
    lane = Lane(Machine(0.1), [Drafter(0.0, 0.02)]).stream(60)
    assert len(asked_places(lane)) < 20
    reason = lane.seqs[0].outlook.reason
    assert reason.startswith("drafts cost more than they saved (drafts of length ") and "plain steps" in reason


def test_a_drafter_that_helps_has_no_reason() -> None:
    lane = Lane(Machine(0.02), [Drafter(0.8)]).stream(200)
    assert lane.seqs[0].outlook.reason is None and len(asked_places(lane)) > 0.9 * len(lane.steps)


@pytest.mark.parametrize(
    "drafter", [Drafter(0.0, 0.02), Drafter(0.0, 0.005, longest=28, is_tree=True)], ids=["chain", "tree"]
)
def test_a_paused_drafter_is_tried_now_and_then_for_ever(drafter: Drafter) -> None:
    lane = Lane(Machine(0.05), [drafter]).stream(4000, length=4000)
    for start in range(1000, 4000, 1000):
        assert 5 <= sum(start <= place < start + 1000 for place in asked_places(lane)) <= 20
    assert lane.seconds < 1.02 * 4000


def test_a_dear_drafter_gets_a_short_trial() -> None:
    """Drafts of a cheap drafter are tried for some steps; a drafter that is slower than plain steps is stopped at once."""
    counts = [len(asked_places(Lane(Machine(0.1), [Drafter(0.0, cost)]).stream(60))) for cost in (0.0, 0.2, 4.0)]
    assert counts[0] > counts[1] > counts[2] and counts[2] <= 2


def test_acceptance_that_turns_bad_pauses_the_drafter_soon() -> None:
    lane = Lane(Machine(0.05), [Drafter(turns(0.9, 0.0, 300), 0.02)]).stream(700, length=1000)
    steps = [step for step in lane.steps if step.places[0] >= 300]
    assert sum(step.seconds - 1 for step in steps) < 14, "plain steps lost over 400 tokens"
    assert sum(bool(step.asked) for step in steps if step.places[0] > 360) <= 8


@pytest.mark.parametrize("bad", [20, 100, 400, 2000])
def test_a_drafter_that_turns_good_is_used_again_soon(bad: int) -> None:
    """However long it was bad, it is tried again within 64 tokens; a trial may be unlucky."""
    for seed in range(3):
        lane = Lane(Machine(0.05), [Drafter(turns(0.0, 0.95, bad), 0.02)], seed=seed).stream(bad + 500, length=4000)
        late = [step for step in lane.steps if step.places[0] >= bad + 200]
        assert sum(bool(step.asked) for step in late) > 0.9 * len(late)


def test_a_drafter_that_is_good_in_stretches_is_used_in_each_of_them() -> None:
    lane = Lane(Machine(0.05), [Drafter(alternates(0.0, 0.95, 400), 0.02)]).stream(4000, length=4000)
    for start in (400, 1200, 2000, 2800):
        assert sum(start <= step.places[0] < start + 400 for step in lane.steps) < 250, "steps for 400 tokens"


def test_pauses_of_a_lane_end_when_its_drafter_is_paid_for() -> None:
    """The time that a drafter loses in a lane is bounded, however many sequences begin."""
    lane = Lane(Machine(0.3), [Drafter(0.0, 0.3)]).serve(100, 40)
    plain = sum(lane.machine.forward(1) for _ in range(4000))
    assert lane.seconds < 1.02 * plain
    tried = sum(bool(step.asked) for step in lane.steps)
    assert 5 < tried < 100, "it is tried now and then"


def test_sequences_of_a_batch_pay_their_trials_from_one_purse() -> None:
    """Sixteen new sequences of a drafter that the lane knows to be bad do not try it all at once."""
    lane = Lane(Machine(0.2, free=16), [Drafter(0.0)]).serve(1, 400)
    before, start = lane.seconds, len(lane.steps)
    lane.serve(16, 40, 16)
    assert lane.seconds - before < len(lane.steps) - start + 8, "sixteen trials of 0.8 plain steps would cost 13"
    assert any(step.asked for step in lane.steps[start:])


# ---- searches that find no draft


@pytest.mark.parametrize("num_drafted", [0, 100], ids=["never a draft", "drafts before"])
def test_a_slow_search_without_a_draft_is_paused_at_once_and_the_reason_is_said(num_drafted: int) -> None:
    drafter = Drafter(0.9, has_draft=lambda place: place < num_drafted)
    lane = Lane(Machine(noise=0.0), [drafter]).stream(num_drafted + 1, length=4000)
    drafter.search, start = 100.0, len(lane.steps)
    lane.stream(2000, length=4000)
    assert sum(bool(step.asked) for step in lane.steps[start:]) <= 2
    reason = lane.seqs[0].outlook.reason
    assert reason == "its own work took 100000.0 ms a step, the time of 100.00 plain steps, and found no draft"


@pytest.mark.parametrize("search", [0.02, 0.1, 0.5, 2.0, 10.0, 100.0])
def test_searches_without_drafts_cost_about_one_percent(search: float) -> None:
    """The first two searches show the price. It is paid for before the next search, however high it is."""
    num_tokens = 20000 if search > 5 else 4000
    lane = Lane(Machine(noise=0.0), [Drafter(has_draft=nowhere, search=search)]).stream(num_tokens, length=30000)
    assert lane.seconds - 2 * search < 1.011 * num_tokens + 4


def test_a_cheap_search_is_made_in_every_step() -> None:
    lane = Lane(Machine(), [Drafter(has_draft=nowhere, search=0.005)]).stream(2000, length=3000)
    assert all(step.asked for step in lane.steps)


def test_an_index_that_is_built_once_does_not_count_as_a_slow_search() -> None:
    lane = Lane(Machine(), [Drafter(has_draft=nowhere, search=0.001, index=20.0)]).stream(1000, length=3000)
    assert all(step.asked for step in lane.steps)


def test_after_a_pause_of_a_slow_search_a_draft_brings_the_drafter_back() -> None:
    drafter = Drafter(0.9, has_draft=lambda place: place >= 400, search=3.0)
    lane = Lane(Machine(0.02), [drafter]).stream(390, length=3000)
    assert lane.seqs[0].outlook.reason is not None
    drafter.search = 0.0
    lane.stream(1500, length=3000)
    assert all(step.asked for step in lane.steps[-20:]) and lane.seqs[0].outlook.reason is None


def test_a_paused_drafter_that_finds_no_draft_at_its_probe_is_asked_in_the_next_step() -> None:
    """A probe needs a draft: a search that finds no draft in one place says nothing of the text behind it."""
    drafter = Drafter(turns(0.0, 0.95, 60), 0.02, has_draft=lambda place: not 60 <= place < 160)
    lane = Lane(Machine(0.05), [drafter]).stream(300, length=1000)
    assert len([place for place in asked_places(lane) if 140 <= place < 160]) == 20
    assert all(step.drafted for step in lane.steps[-10:])


def test_a_limit_of_no_draft_tokens_uses_up_no_probe() -> None:
    lane = Lane(Machine(0.05), [Drafter(turns(0.0, 0.95, 50), 0.02)]).stream(50, length=1000)
    lane.draft_limit = 0
    lane.stream(400, length=1000)
    lane.draft_limit = 16
    lane.step()
    assert lane.steps[-1].asked


# ---- the machine changes


def test_a_machine_that_becomes_slower_makes_a_slow_drafter_worth_its_time() -> None:
    """The drafter is no slower than before, and plain steps take four times as long."""
    lane = Lane(Machine(0.02, pace=changes(4.0, 150)), [Drafter(0.7, 0.8)]).stream(3000, length=3000)
    assert sum(bool(step.asked) for step in lane.steps[50:150]) <= 5
    assert sum(bool(step.asked) for step in lane.steps[-100:]) > 90


def test_a_machine_that_becomes_faster_pauses_a_drafter_that_is_too_slow_now() -> None:
    lane = Lane(Machine(0.02, pace=changes(0.1, 50)), [Drafter(0.6, 0.1)]).stream(2000, length=2000)
    assert sum(bool(step.asked) for step in lane.steps[10:50]) > 35
    assert sum(bool(step.asked) for step in lane.steps[-200:]) < 10


def test_a_moment_of_slow_steps_does_not_pause_a_good_drafter() -> None:
    slow = lambda step: 20.0 if 60 <= step < 63 else 1.0  # noqa: E731
    lane = Lane(Machine(0.02, pace=slow), [Drafter(0.8, 0.05)]).stream(600, length=1000)
    assert sum(bool(step.asked) for step in lane.steps[63:163]) > 85
