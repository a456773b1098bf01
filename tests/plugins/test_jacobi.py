"""Jacobi decoding: the first window of guesses, its corrections by the target's tokens, and accepted guesses."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, Limits, SamplingParams, Sequence
from pitlane.engine.sequence import Request, Timing
from pitlane.plugins.jacobi import Jacobi


def make_seq(token_ids: list[int]) -> Sequence:
    nothing = cast(Any, None)
    request = Request(len(token_ids), SamplingParams(), seed=0)
    return Sequence(0, request, nothing, list(token_ids), nothing, Timing(0.0))


def propose(plugin: Jacobi, seq: Sequence, limit: int = 64) -> Draft | None:
    return plugin.propose([seq], Limits([limit], cast(Any, None)))[0]


def plugin(window: int = 4) -> Jacobi:
    return Jacobi(Jacobi.parse_options({"window": window}))


def test_first_guesses_are_the_last_tokens() -> None:
    draft = propose(plugin(4), make_seq([7, 8, 9]))
    assert draft == Draft([9, 8, 7, 9])
    assert propose(plugin(3), make_seq([5])) == Draft([5, 5, 5]), "a prompt of one token is enough"


def test_a_limit_cuts_the_window_and_keeps_the_guesses() -> None:
    jacobi, seq = plugin(4), make_seq([7, 8, 9])
    assert propose(jacobi, seq, 2) == Draft([9, 8])
    assert propose(jacobi, seq, 0) is None
    assert propose(jacobi, seq) == Draft([9, 8, 7, 9])


def test_each_guess_is_replaced_by_the_targets_token_at_its_position() -> None:
    """No guess is accepted: target 0 is the new known token, targets 1 to 4 are the new guesses behind it."""
    jacobi, seq = plugin(4), make_seq([7, 8, 9])
    draft = propose(jacobi, seq)
    jacobi.after_verify(seq, draft, [20, 21, 22, 23, 24], [])
    seq.token_ids.append(20)
    assert propose(jacobi, seq) == Draft([21, 22, 23, 24])


def test_accepted_guesses_leave_the_window_and_new_ones_join_it() -> None:
    jacobi, seq = plugin(4), make_seq([7, 8, 9])
    draft = propose(jacobi, seq)
    jacobi.after_verify(seq, draft, [9, 8, 22, 23, 24], [0, 1])
    seq.token_ids += [9, 8, 22]
    draft = propose(jacobi, seq)
    assert draft is not None and list(draft.token_ids[:2]) == [23, 24], "the target's tokens at the remaining positions"
    assert len(draft.token_ids) == 4 and set(draft.token_ids) <= {*seq.token_ids, 23, 24}


def test_a_window_that_was_not_verified_stays() -> None:
    jacobi, seq = plugin(3), make_seq([7, 8, 9])
    assert propose(jacobi, seq) == propose(jacobi, seq) is not None
    fresh = make_seq([1, 2])
    jacobi.after_verify(fresh, Draft([1]), [5, 6], [])
    assert fresh.state == {}, "a sequence without a window gets none"


def test_a_step_corrects_the_window_and_the_next_step_accepts_it() -> None:
    """A target that depends on the position alone, so that wrong guesses do not spoil the guesses behind them."""
    text = list(range(100, 160))
    jacobi, seq, gains = plugin(6), make_seq(text[:1]), []
    while seq.num_tokens < 48:
        draft = propose(jacobi, seq)
        assert draft is not None
        targets = text[seq.num_tokens :][: 1 + len(draft.token_ids)]
        accepted: list[int] = []
        while len(accepted) < len(draft.token_ids) and draft.token_ids[len(accepted)] == targets[len(accepted)]:
            accepted.append(len(accepted))
        jacobi.after_verify(seq, draft, targets, accepted)
        seq.token_ids += targets[: len(accepted) + 1]
        gains.append(len(accepted) + 1)
    assert gains == [1, 7] * 6


def test_options() -> None:
    assert Jacobi.Options().window == 6
    with pytest.raises(BadOption, match="jacobi.window = '0'"):
        Jacobi.parse_options({"window": "0"})
    with pytest.raises(BadOption, match="jacobi.window = '65'"):
        Jacobi.parse_options({"window": "65"})


@pytest.mark.usefixtures("always_draft")
def test_fewer_steps_where_the_text_is_predictable(make_engine: Any) -> None:
    """Greedy text of a random model ends in a loop. After one round, the window holds the right tokens."""
    engine = make_engine()
    params = SamplingParams(max_tokens=256, ignore_eos=True)
    tokens = [random.Random(1).randrange(256) for _ in range(40)]
    plain = engine.generate(tokens, params)
    drafted = engine.generate(tokens, params, plan=engine.plan({"jacobi": {}}))
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats["accepted_tokens"] == 256 - drafted.stats["steps"] > 0
    assert drafted.stats["failed"] == {} and drafted.stats["plugin_ms"]["jacobi"] > 0
