"""What the sequences of a lane share: experience with a drafter, the step, and the time of prompts beside streams."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pitlane.engine.pacing.pacing import Pacing
from tests.engine.pacing.scenarios import in_stretches, nowhere
from tests.engine.pacing.simulator import Drafter, Lane, Machine, Step


def steps_of(lane: Lane, seq_id: int) -> list[Step]:
    return [step for step in lane.steps if seq_id in step.places]


def test_a_second_sequence_starts_with_long_drafts_where_the_first_was_drafted_well() -> None:
    lane = Lane(Machine(0.01), [Drafter(0.95)]).serve(2, 300)
    first, second = steps_of(lane, 0), steps_of(lane, 1)
    assert first[0].asked[0] <= 8 < second[0].asked[1]
    assert len(second) < 1.1 * len(first)


def test_a_second_sequence_probes_a_bad_drafter_once_and_leaves_it() -> None:
    lane = Lane(Machine(0.1), [Drafter(0.0, 0.02)]).serve(2, 300)
    first, second = (sum(bool(step.asked) for step in steps_of(lane, seq_id)) for seq_id in (0, 1))
    assert first > 10 and second <= 6


def test_what_a_lane_knows_of_a_drafter_outlives_its_instance_and_belongs_to_its_options() -> None:
    lane = Lane(Machine(0.1), [Drafter(0.0, 0.02)]).serve(1, 300)
    tried = []
    for name in ("drafter", "drafter with other options"):
        lane.plans = [SimpleNamespace(drafter=Drafter(0.0, 0.02, name=name))]
        start = len(lane.steps)
        lane.serve(1, 60)
        tried.append(sum(bool(step.asked) for step in lane.steps[start:]))
    assert tried[0] <= 2 < 5 <= tried[1]


def test_a_text_that_is_drafted_badly_is_not_drafted_because_the_others_are() -> None:
    drafters = [Drafter(rate, name="same") for rate in (0.9, 0.9, 0.9, 0.0)]
    lane = Lane(Machine(0.06, free=4), drafters).stream(4000, 4, length=2000)
    steps = lane.steps[-100:]
    assert sum(3 in step.asked for step in steps) <= 5 and sum(0 in step.asked for step in steps) > 90


# ---- two drafters in a step


def test_of_two_drafters_in_one_step_the_bad_one_is_paused_and_the_good_one_drafts() -> None:
    good, bad = Drafter(0.9, 0.01, name="good"), Drafter(0.0, 0.1, name="bad")
    lane = Lane(Machine(0.03, free=4), [good, bad]).stream(3000, 4, length=2000)
    for seq in lane.seqs:
        assert (seq.outlook.reason is not None) == (seq.plan.drafter is bad)
        share = sum(seq.id in step.asked for step in lane.steps[-100:]) / 100
        assert share < 0.1 if seq.plan.drafter is bad else share > 0.9


def test_a_drafter_that_finds_nothing_does_not_shorten_the_drafts_of_another() -> None:
    def tokens(beside: Drafter | None) -> float:
        lane = Lane(Machine(0.1, free=2), [Drafter(0.85, 0.03, name="model"), beside]).stream(1500, 2, length=1500)
        return sum(step.drafted.get(0, 0) for step in lane.steps) / len(lane.steps)

    alone = tokens(None)
    assert alone > 1
    assert tokens(Drafter(has_draft=nowhere, name="lookup")) > 0.9 * alone


def test_time_besides_a_step_of_two_drafters_is_charged_to_neither() -> None:
    """Nobody knows which of them is slow. Alone in a step, the slow drafter is paused."""
    drafters = [Drafter(0.6, name="a"), Drafter(0.6, name="b")]
    lane = Lane(Machine(0.01, draft_overhead=3.0), drafters).stream(40, 2, length=2000)
    assert all(sum(bool(step.asked) for step in steps_of(lane, seq_id)) > 8 for seq_id in (0, 1))
    alone = Lane(Machine(0.01, draft_overhead=3.0), drafters[:1]).stream(40, length=2000)
    assert sum(bool(step.asked) for step in alone.steps) < 8


# ---- prompts beside


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_steps_with_a_prompt_teach_nothing_wrong(rate: float) -> None:
    """Long steps with a prompt change neither the drafts of a good drafter nor the pause of a bad drafter."""
    means = []
    for num_prompts in (0, 5):
        machine = Machine(0.03, free=2, prompt_overhead=20.0)
        lane = Lane(machine, [Drafter(rate, 0.02)]).stream(400, length=8000)
        for _ in range(num_prompts):
            prompt = lane.add(1, num_prompt_tokens=2000)
            while prompt in lane.seqs:
                lane.step()
        start = len(lane.steps)
        lane.stream(lane.num_new_tokens + 1500, length=8000)
        steps = lane.steps[start:]
        means.append(sum(sum(step.drafted.values()) for step in steps) / len(steps))
    assert means[1] == pytest.approx(means[0], rel=0.1, abs=0.03)


def test_a_prompt_beside_streams_delays_their_tokens_little_and_is_read_in_good_time() -> None:
    lane = Lane(Machine(0.02, noise=0.1), [None]).stream(100, 4, length=3000)
    prompt = lane.add(1, num_prompt_tokens=3000)
    start = len(lane.steps)
    while prompt in lane.seqs:
        lane.step()
    delays = sorted(step.seconds for step in lane.steps[start:])
    plain = lane.machine.forward(4)
    assert delays[int(0.95 * len(delays))] < 2.5 * plain
    reading = sum(delays) - len(delays) * plain
    assert sum(delays) < 3 * reading, "about half of the time goes to the prompt"


@pytest.mark.parametrize("spikes", [0.0, 0.03])
def test_a_slow_moment_does_not_starve_a_prompt(spikes: float) -> None:
    lane = Lane(Machine(0.02, noise=0.1, spikes=spikes), [None]).stream(100, 4, length=3000)
    prompt = lane.add(1, num_prompt_tokens=3000)
    start = len(lane.steps)
    while prompt in lane.seqs:
        lane.step()
    assert len(lane.steps) - start < 130


def test_without_a_stream_a_prompt_has_the_whole_step() -> None:
    assert Pacing(512).prompt_tokens(0, False, 500) == 500
    lane = Lane(Machine(0.01), [None], max_step_tokens=100)
    lane.add(1, num_prompt_tokens=950)
    while lane.seqs:
        lane.step()
    assert [step.num_prompt_tokens for step in lane.steps[:10]] == [100] * 9 + [50]


def test_streams_and_prompts_and_drafts_fit_into_one_step() -> None:
    drafters: list[Any] = [Drafter(0.9, has_draft=in_stretches(0.5, 40)), None]
    lane = Lane(Machine(0.01), drafters, max_step_tokens=64).stream(2000, 6, length=100, num_prompt_tokens=200)
    assert max(step.num_tokens for step in lane.steps) <= 64
