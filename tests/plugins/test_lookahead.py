"""Lookahead decoding: the tree of a draft, the window's iterations, and the pool of n-grams."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, Limits, SamplingParams, Sequence
from pitlane.engine.decode.draft import clean, depths, merged_children
from pitlane.engine.sequence import Request, Timing
from pitlane.plugins.lookahead import Lookahead, Pool


def make_seq(token_ids: list[int]) -> Sequence:
    nothing = cast(Any, None)
    request = Request(len(token_ids), SamplingParams(), seed=0)
    return Sequence(0, request, nothing, list(token_ids), nothing, Timing(0.0))


def plugin(window: int = 4, ngram: int = 4, candidates: int = 4) -> Lookahead:
    return Lookahead(Lookahead.parse_options({"window": window, "ngram": ngram, "candidates": candidates}))


def propose(plugin: Lookahead, seq: Sequence, limit: int = 256) -> Draft | None:
    return plugin.propose([seq], Limits([limit], cast(Any, None)))[0]


def step(plugin: Lookahead, seq: Sequence, table: list[int], limit: int = 256) -> Draft:
    """One step of a target whose next token is `table[token]`."""
    draft = propose(plugin, seq, limit)
    assert draft is not None and draft.parents is not None
    targets = [table[token] for token in [seq.token_ids[-1], *draft.token_ids]]
    children, accepted, node = merged_children(draft), [], -1
    while (child := children.get(node, {}).get(targets[node + 1])) is not None:
        accepted.append(child)
        node = child
    plugin.after_verify(seq, draft, targets, accepted)
    seq.token_ids += [draft.token_ids[child] for child in accepted] + [targets[node + 1]]
    return draft


# ---- the window


def test_the_first_window_is_a_chain_of_the_last_tokens() -> None:
    assert propose(plugin(window=4), make_seq([5, 6, 7])) == Draft([7, 6, 5, 7], [-1, 0, 1, 2])


@pytest.mark.parametrize("window, ngram", [(1, 2), (3, 2), (4, 3), (5, 4), (2, 6)])
def test_parents_of_the_window(window: int, ngram: int) -> None:
    """The parent of level l, column i is level l - 1, column i. The parent of level 0, column i is column i - 1."""
    lookahead, seq = plugin(window, ngram), make_seq([1])
    table = [*range(1, 400), 0]  # the text never repeats, so no n-gram of the pool is drafted
    for iteration in range(ngram + 3):
        draft = step(lookahead, seq, table)
        assert draft.parents is not None
        levels = min(iteration + 1, ngram - 1)
        start = len(draft.token_ids) - levels * window
        rows = [draft.token_ids[start + level * window :][:window] for level in range(levels)]
        parents = [draft.parents[start + level * window :][:window] for level in range(levels)]
        assert parents[0] == [-1, *range(start, start + window - 1)]
        for level in range(1, levels):
            assert parents[level] == [start + (level - 1) * window + column for column in range(window)]
            assert rows[level] == [table[token] for token in rows[level - 1]], "the target's tokens of the step before"
        places = depths(draft.parents)[start:]
        assert places == [1 + level + column for level in range(levels) for column in range(window)]
        assert clean(draft, 256, 512) is not None


def test_only_the_last_iterations_are_kept() -> None:
    lookahead, seq = plugin(window=3, ngram=4), make_seq([1])
    table = [*range(1, 400), 0]
    sizes = [len(step(lookahead, seq, table).token_ids) for _ in range(8)]
    assert sizes[:3] == [3, 6, 9]
    state = seq.state["lookahead"]
    assert len(state.levels) == 3 and all(len(row) == 3 for row in state.levels)


def test_complete_columns_become_ngrams() -> None:
    lookahead, seq = plugin(window=2, ngram=3), make_seq([10, 20])
    table = [*range(1, 400), 0]
    for _ in range(2):
        step(lookahead, seq, table)
    rests = seq.state["lookahead"].pool.rests
    assert (21, 22) in rests[20] and (11, 12) in rests[10], "the first window is 20 10"


def test_a_window_that_the_limit_cut_keeps_its_iteration() -> None:
    lookahead, seq = plugin(window=4, ngram=3), make_seq([5, 6, 7])
    table = [*range(1, 400), 0]
    before = propose(lookahead, seq, 2)
    assert before is not None and len(before.token_ids) == 2
    step(lookahead, seq, table, limit=2)
    assert len(seq.state["lookahead"].levels) == 1
    step(lookahead, seq, table)
    assert len(seq.state["lookahead"].levels) == 2


def test_a_limit_of_zero_gives_no_draft() -> None:
    lookahead, seq = plugin(), make_seq([1, 2, 3])
    assert propose(lookahead, seq, 0) is None and seq.state == {}
    lookahead.after_verify(seq, Draft([1]), [4, 5], [])
    assert seq.state == {}


def test_ngrams_of_a_text_that_repeats_are_accepted() -> None:
    """A target that repeats 12 tokens: after one round, whole n-grams are accepted."""
    lookahead, seq = plugin(), make_seq([0])
    table = [(token + 1) % 12 for token in range(12)]
    lengths = []
    while seq.num_tokens < 80:
        before = seq.num_tokens
        step(lookahead, seq, table)
        lengths.append(seq.num_tokens - before)
    assert seq.token_ids == [index % 12 for index in range(seq.num_tokens)]
    assert min(lengths[-5:]) >= 4


# ---- the pool


def test_ngrams_come_first_and_share_their_beginnings() -> None:
    lookahead = plugin(window=1, ngram=4, candidates=4)
    seq = make_seq([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 6, 7, 9, 1])
    draft = propose(lookahead, seq)
    assert draft is not None and draft.parents is not None
    assert list(draft.token_ids[:-1]) == [2, 6, 7, 3, 5, 4], "the latest first"
    assert list(draft.parents[:-1]) == [-1, 0, 1, 0, 3, 3]
    assert draft.parents[-1] == -1, "then the window"


def test_the_pool_is_bounded_per_first_token_and_forgets_the_oldest() -> None:
    pool = Pool(3, 2)
    for ngram in ((1, 2, 3), (1, 4, 5), (7, 7, 7), (1, 2, 3), (1, 6, 6)):
        pool.add(ngram)
    assert list(pool.rests[1]) == [(2, 3), (6, 6)], "an n-gram that comes again becomes the latest"
    assert list(pool.rests[7]) == [(7, 7)]
    generator = random.Random(0)
    for _ in range(5000):
        pool.add((generator.randrange(9), generator.randrange(9), generator.randrange(9)))
    assert set(pool.rests) == set(range(9)) and all(len(rests) == 2 for rests in pool.rests.values())


@pytest.mark.parametrize("candidates", [1, 3])
def test_at_most_candidates_ngrams_are_drafted(candidates: int) -> None:
    lookahead = plugin(window=1, ngram=3, candidates=candidates)
    tokens = [token for other in range(2, 12) for token in (1, other, other + 20)] + [1]
    draft = propose(lookahead, make_seq(tokens))
    assert draft is not None
    assert len(draft.token_ids) == 2 * candidates + 1


def test_the_pool_grows_with_the_text_in_one_pass() -> None:
    generator = random.Random(1)
    tokens = [generator.randrange(5) for _ in range(200)]
    grown = Pool(3, 4)
    for stop in range(1, len(tokens) + 1):
        grown.grow(tokens[:stop])
        whole = Pool(3, 4)
        whole.grow(tokens[:stop])
        assert grown.rests == whole.rests
        assert [list(grown.rests[first]) for first in grown.rests] == [
            list(whole.rests[first]) for first in grown.rests
        ]


def test_each_sequence_has_its_own_pool() -> None:
    lookahead = plugin(window=1)
    first, second = make_seq([1, 2, 3, 4, 1]), make_seq([9, 8, 7, 6, 1])
    propose(lookahead, first)
    draft = propose(lookahead, second)
    assert draft is not None and 2 not in draft.token_ids


def test_options() -> None:
    options = Lookahead.Options()
    assert (options.window, options.ngram, options.candidates) == (4, 4, 4)
    with pytest.raises(BadOption, match="lookahead.ngram = '1'"):
        Lookahead.parse_options({"ngram": "1"})


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("options", [{}, {"window": 1, "ngram": 2, "candidates": 1}, {"window": 8, "candidates": 1}])
def test_fewer_steps_where_the_text_repeats(make_engine: Any, options: dict[str, int]) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=256, ignore_eos=True)
    tokens = [random.Random(1).randrange(256) for _ in range(40)]
    plain = engine.generate(tokens, params)
    drafted = engine.generate(tokens, params, plan=engine.plan({"lookahead": options}))
    assert drafted.token_ids == plain.token_ids and drafted.stats["failed"] == {}
    assert drafted.stats["accepted_tokens"] == 256 - drafted.stats["steps"] > 0
    assert drafted.stats["steps"] < 0.75 * 256
