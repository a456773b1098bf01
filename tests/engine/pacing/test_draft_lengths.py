"""How many draft tokens pacing asks for: by acceptance, by cost, by batch, and within every limit."""

from __future__ import annotations

import pytest

from tests.engine.pacing.scenarios import nowhere
from tests.engine.pacing.simulator import Drafter, Lane, Machine, Seq


def mean_length(machine: Machine, drafter: Drafter, num_seqs: int = 1, num_tokens: int = 1500) -> float:
    """Draft tokens of a sequence and step, once the drafter is known."""
    lane = Lane(machine, [drafter]).stream(num_tokens, num_seqs)
    steps = lane.steps[len(lane.steps) // 2 :]
    return sum(sum(step.drafted.values()) for step in steps) / sum(len(step.places) for step in steps)


def test_a_drafter_that_is_right_more_often_drafts_more() -> None:
    lengths = [mean_length(Machine(0.05), Drafter(rate, longest=64)) for rate in (0.05, 0.5, 0.7, 0.9, 0.97)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 0.2 and lengths[1] > 1 and lengths[-1] > 8


@pytest.mark.parametrize("dear", ["forward", "draft", "rows", "besides"])
def test_drafts_are_shorter_the_more_they_cost(dear: str) -> None:
    def length(cost: float) -> float:
        machine = Machine(0.005 + cost * (dear == "forward"), draft_overhead=20 * cost * (dear == "besides"))
        drafter = Drafter(0.8, per_token=cost * (dear == "draft"), per_row=cost * (dear == "rows"))
        return mean_length(machine, drafter)

    lengths = [length(cost) for cost in (0.0, 0.1, 1.5)]
    assert lengths[0] > 5 and lengths[2] < 0.2, "drafts that cost too much are not made"
    if dear != "besides":  # the time besides is the same for drafts of all lengths
        assert lengths[0] > lengths[1] + 1 > 1.5


def test_tokens_that_a_forward_has_for_free_are_used_and_no_more() -> None:
    """On a GPU, a forward over few tokens takes as long as a forward over a whole tile."""
    assert 7.5 < mean_length(Machine(0.6, free=9), Drafter(0.7)) < 8.1
    assert mean_length(Machine(0.6, free=9), Drafter(0.4), num_seqs=9) < 0.15, "nine sequences fill the tile themselves"


def test_a_draft_that_pays_alone_is_dropped_where_a_batch_waits_for_it() -> None:
    assert mean_length(Machine(0.1), Drafter(0.5)) > 1
    assert mean_length(Machine(0.1), Drafter(0.5), num_seqs=16, num_tokens=8000) < 0.1
    assert mean_length(Machine(0.001), Drafter(0.3), num_seqs=16, num_tokens=8000) > 0.9, "a cheap draft stays"


def test_in_a_batch_the_draft_tokens_go_to_the_texts_that_are_drafted_best() -> None:
    drafters = [Drafter(rate, name="same") for rate in (0.95, 0.4)]
    lane = Lane(Machine(0.05, free=4), drafters).stream(3000, 4, length=2000)
    asked = [sum(step.asked.get(seq_id, 0) for step in lane.steps[-100:]) for seq_id in range(4)]
    assert min(asked[0], asked[2]) > 5 * max(asked[1], asked[3])


def test_a_draft_never_exceeds_the_rest_of_the_answer_or_a_limit() -> None:
    for limit in (0, 1, 3, 7):
        lane = Lane(Machine(0.001), [Drafter(0.98)], draft_limit=limit).serve(20, 30, num_seqs=2)
        for step in lane.steps:
            assert all(number <= min(limit, 30 - step.places[seq_id] - 1) for seq_id, number in step.asked.items())
        assert limit == 0 or max(max(step.asked.values(), default=0) for step in lane.steps) == limit


def test_where_no_draft_is_allowed_nothing_is_learned() -> None:
    lane = Lane(Machine(0.001), [Drafter(0.9)], draft_limit=0).stream(100)
    assert lane.seqs[0].outlook is None and not any(step.asked for step in lane.steps)
    lane.draft_limit = 16
    lane.stream(400)
    assert any(step.asked for step in lane.steps), "the drafter starts as soon as it may"


@pytest.mark.parametrize("num_seqs", [1, 16])
def test_a_step_never_exceeds_its_tokens(num_seqs: int) -> None:
    lane = Lane(Machine(0.0001), [Drafter(0.97, longest=64)], max_step_tokens=40).stream(3000, num_seqs, 200, 30)
    assert max(step.num_tokens for step in lane.steps) == 40, "and the tokens are used"
    for step in lane.steps:
        assert step.num_tokens - sum(step.drafted.values()) + sum(step.asked.values()) <= 40


def test_drafts_grow_while_a_drafter_gives_all_that_is_asked_for() -> None:
    lane = Lane(Machine(0.0005), [Drafter(0.99, longest=40)]).stream(2500, length=2000)
    asked = [step.asked[0] for step in lane.steps if 0 in step.asked]
    assert asked[0] <= 8, "nothing is known yet"
    assert max(asked[:10]) >= 32
    assert max(asked) == 64 or max(asked) == 41, "more than the drafter gives is asked for at most once"
    assert asked[-1] <= 41


def test_a_drafter_with_short_drafts_is_not_asked_for_long_drafts() -> None:
    """Long drafts that never come would make the others in the step seem dear."""
    lane = Lane(Machine(0.0005), [Drafter(0.99, longest=3)]).stream(1000)
    assert all(number <= 4 for step in lane.steps[5:] for number in step.asked.values())


def test_a_tree_is_asked_for_as_a_whole() -> None:
    lane = Lane(Machine(0.002), [Drafter(0.2, longest=28, is_tree=True)]).stream(2000)
    drafted = [number for step in lane.steps[len(lane.steps) // 2 :] for number in step.drafted.values()]
    assert sum(number == 28 for number in drafted) > 0.9 * len(drafted)


def test_before_any_step_was_timed_a_drafter_may_draft() -> None:
    lane = Lane(Machine(0.01), [Drafter(0.9)], is_calibrated=False)
    lane.add(100)
    lane.step()
    assert lane.steps[0].asked[0] > 0


def test_an_unknown_drafter_tries_the_sequences_in_turn() -> None:
    """A batch does not pay for all first drafts at once, and a text without drafts does not hide the drafts of the others."""
    drafter = Drafter(0.9, has_draft=nowhere)
    lane = Lane(Machine(0.01), [drafter]).stream(15, 5)
    assert [list(step.asked) for step in lane.steps] == [[0], [1], [2]]
    drafter.has_draft = lambda place: place % 2 == 1
    lane.stream(600, 5)
    assert all(step.drafted for step in lane.steps[-20:])


def test_limits_of_sequences_are_kept_apart() -> None:
    """Memory and answer length leave each sequence another number of draft tokens."""
    lane = Lane(Machine(0.001), [Drafter(0.98)])
    limits = {0: 2, 1: 5, 2: 0}
    lane.limit = lambda seq: min(limits[seq.id], Lane.limit(lane, seq))  # type: ignore[method-assign]
    for _ in limits:
        lane.add(200)
    for _ in range(30):
        lane.step()
    most = {seq_id: max(step.asked.get(seq_id, 0) for step in lane.steps) for seq_id in limits}
    assert most == limits


def test_a_limit_that_is_low_for_a_moment_leaves_no_trace() -> None:
    """A search found no draft; a full pool allows 1 token for one step; then the drafter is asked for as many as before."""
    lane = Lane(Machine(0.01), [Drafter(0.9, has_draft=lambda place: place < 100)]).stream(110, length=400)
    seq: Seq = lane.seqs[0]
    lane.step()
    before = lane.steps[-1].asked[seq.id]
    lane.draft_limit = 1
    lane.step()
    lane.draft_limit = 512
    lane.step()
    assert [step.asked[seq.id] for step in lane.steps[-2:]] == [1, before] and before > 1
