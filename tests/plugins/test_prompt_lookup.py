"""Prompt lookup: the n-gram index, drafts as chains and trees, earlier answers, fewer steps on text that repeats."""

from __future__ import annotations

import random
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, Lane, Limits, SamplingParams, Sequence
from pitlane.engine.sequence import Request, Timing
from pitlane.plugins.prompt_lookup import MAX_USERS, Histories, NgramIndex, PromptLookup


def make_lane() -> Lane:
    return cast(Lane, SimpleNamespace(state={}))


class Bench:
    """The plugin in a lane."""

    def __init__(self, lane: Lane | None = None, **options: int) -> None:
        self.plugin, self.lane = PromptLookup(PromptLookup.parse_options(options)), lane or make_lane()
        self.plugin.lane_opened(self.lane)

    @property
    def histories(self) -> OrderedDict[str, list[NgramIndex]]:
        return cast(Histories, self.lane.state["prompt_lookup"]).by_salt

    def draft(self, seq: Sequence, limit: int) -> Draft | None:
        return self.plugin.propose([seq], Limits([limit], self.lane))[0]

    def finish(self, seq: Sequence) -> None:
        self.plugin.sequence_finished(seq, self.lane)


def sequence(token_ids: list[int], num_prompt_tokens: int | None = None, salt: str = "") -> Sequence:
    count = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
    nothing = cast(Any, None)
    request = Request(count, SamplingParams(), seed=0, salt=salt)
    return Sequence(0, request, nothing, token_ids, nothing, Timing(0.0))


def propose(bench: Bench, token_ids: list[int], limit: int, salt: str = "") -> Draft | None:
    return bench.draft(sequence(token_ids, salt=salt), limit)


def chains(tokens: list[int], **options: int) -> list[list[int]]:
    """Continuations of a single token, the best first."""
    draft = propose(Bench(num_draft_tokens=1, history=0, **options), tokens, 1)
    return [] if draft is None else [list(draft.token_ids)] if draft.parents is None else [[t] for t in draft.token_ids]


def test_the_latest_longest_match_is_found() -> None:
    options = {"min_ngram": 1, "max_ngram": 3}
    assert chains([1, 2, 3], **options) == []
    assert chains([1, 2, 3, 9, 2, 3], **options) == [[9]]  # behind the earlier "2 3"
    assert chains([1, 2, 3, 9, 2, 3, 7, 2, 3], **options) == [[7]]  # the latest match
    # a longer match beats a later, shorter match
    assert chains([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3], **options) == [[9]]
    assert chains([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3, 8], **options) == []


def test_several_matches_come_once_the_longest_and_latest_first() -> None:
    tokens = [1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3]
    for count, expected in ((2, [9, 5]), (8, [9, 5, 7])):
        draft = propose(Bench(min_ngram=1, max_ngram=3, num_candidates=count, num_draft_tokens=1), tokens, 9)
        assert draft == Draft(expected, [-1] * len(expected))
    assert chains(tokens, min_ngram=3, max_ngram=3, num_candidates=8) == [[9]]


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_an_index_that_grows_token_by_token_drafts_as_a_new_index(num_candidates: int) -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(300)]
    grown, seq = Bench(num_candidates=num_candidates), sequence(tokens[:1])
    for stop in range(2, len(tokens) + 1):
        seq.token_ids.append(tokens[stop - 1])
        draft = grown.draft(seq, 8)
        assert draft == propose(Bench(num_candidates=num_candidates), tokens[:stop], 8)


def test_earlier_answers_to_the_same_user_are_drafted_from() -> None:
    bench = Bench(num_draft_tokens=4)
    bench.finish(sequence([50, 51, 8, 9, 1, 2, 3, 4, 5], num_prompt_tokens=4, salt="ann"))
    assert propose(bench, [60, 8, 9], 4, salt="ann") == Draft([1, 2, 3, 4]), "the match begins in the prompt"
    assert propose(bench, [60, 3, 4], 4, salt="ann") == Draft([5]), "a draft ends with the answer"
    assert propose(bench, [60, 4, 5], 4, salt="ann") is None
    assert propose(bench, [3, 4, 7, 3, 4], 4, salt="ann") == Draft([7, 3, 4]), "its own text comes first"
    assert propose(bench, [2, 3, 4, 60, 3, 4, 7, 2, 3, 4], 1, salt="ann") == Draft([60])
    assert propose(bench, [60, 8, 9], 4, salt="bob") is propose(bench, [60, 8, 9], 4) is None, (
        "other users get no draft"
    )


def test_other_options_draft_from_the_same_answers() -> None:
    lane = make_lane()
    Bench(lane).finish(sequence([8, 9, 1, 2, 3], num_prompt_tokens=2))
    assert propose(Bench(lane, num_draft_tokens=2, min_ngram=1), [60, 9], 4) == Draft([1, 2])
    cast(Histories, lane.state["prompt_lookup"]).close()
    assert propose(Bench(lane), [8, 9], 4) is None


def test_accepted_tokens_that_came_from_earlier_answers_are_noted() -> None:
    bench = Bench(num_draft_tokens=4)
    bench.finish(sequence([8, 9, 1, 2, 3, 4], num_prompt_tokens=2))
    seq = sequence([50, 51, 60, 50, 51, 70, 8, 9], num_prompt_tokens=8)

    def step(accepted: int, *token_ids: int) -> None:
        bench.draft(seq, 4)
        seq.timing.num_accepted_tokens += accepted
        seq.token_ids.extend(token_ids)

    step(3, 1, 2, 3, 50)  # three of the four tokens of the earlier answer
    step(0, 51)  # no match
    step(2, 70, 8, 5)  # from its own text
    bench.finish(seq)
    assert seq.notes["prompt_lookup"] == {"replayed_tokens": 3} and seq.timing.num_accepted_tokens == 5


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_an_answer_given_twice_is_noted_as_replayed(make_engine: Any, always_draft: None, num_candidates: int) -> None:
    engine = make_engine(plugins={"prompt_lookup": {"num_candidates": num_candidates}})
    # at this temperature the answer does not repeat itself
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    prompt = list(range(100, 140))
    first, second = (engine.generate(prompt, params).stats for _ in range(2))
    assert first["notes"]["prompt_lookup"]["replayed_tokens"] == 0
    assert second["notes"]["prompt_lookup"]["replayed_tokens"] == second["accepted_tokens"] > 30


def test_no_answer_is_remembered_without_an_answer_or_without_history() -> None:
    bench = Bench(history=0)
    bench.finish(sequence([8, 9, 1, 2, 3], num_prompt_tokens=2))
    assert propose(bench, [8, 9], 4) is None and not bench.histories
    bench = Bench()
    bench.finish(sequence([8, 9, 1, 2, 3]))  # a prompt alone
    assert not bench.histories


def test_the_memory_of_answers_is_bounded_and_the_oldest_goes_first() -> None:
    bench = Bench(history=100)
    for start in range(1000, 9000, 10):
        bench.finish(sequence(list(range(start, start + 10)), num_prompt_tokens=2))
    assert 50 <= sum(len(index.token_ids) for index in bench.histories[""]) <= 120
    assert propose(bench, [8952, 8953], 2) == Draft([8954, 8955])
    assert propose(bench, [8802, 8803], 2) is None
    bench.finish(sequence(list(range(500)), num_prompt_tokens=2))
    assert propose(bench, [497, 498], 2) == Draft([499]), "the end of a long answer is kept"
    least = Bench(history=1)
    least.finish(sequence(list(range(500)), num_prompt_tokens=2))
    assert sum(len(index.token_ids) for index in least.histories[""]) <= 2
    for user in range(MAX_USERS):
        bench.finish(sequence([1, 2, 3, 4], num_prompt_tokens=2, salt=str(user)))
    assert len(bench.histories) == MAX_USERS and "" not in bench.histories


def test_one_continuation_is_a_chain_and_several_are_a_tree() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2]
    single = Bench()
    assert propose(single, tokens, 3) == Draft([3, 6, 7])
    several = Bench(num_candidates=4)
    assert propose(several, tokens, 3) == Draft([3, 6, 7, 4, 5], [-1, 0, 1, 0, 3])
    assert propose(several, tokens[:7], 3) == Draft([3, 4, 5])
    for bench in (single, several):
        assert propose(bench, tokens, 0) is None
        assert propose(bench, [1, 2, 3], 5) is None
    text = list(range(50)) * 2
    assert propose(single, text, 64) == propose(single, text, 8), "num_draft_tokens is a limit too"


def test_bad_options_are_named() -> None:
    with pytest.raises(BadOption, match="min_ngram must be at most max_ngram, got 5 and 4"):
        PromptLookup.parse_options({"min_ngram": 5})
    with pytest.raises(BadOption, match="prompt_lookup.num_draft_tokens = '0'"):
        PromptLookup.parse_options({"num_draft_tokens": "0"})
    with pytest.raises(BadOption, match="no option 'ngrams'; its options are: num_draft_tokens"):
        PromptLookup.parse_options({"ngrams": 3})


@pytest.mark.usefixtures("always_draft")
def test_fewer_steps_where_the_text_repeats(make_engine: Any) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=256, ignore_eos=True)
    tokens = [random.Random(1).randrange(256) for _ in range(40)]
    plain = engine.generate(tokens, params, plan=engine.plan({}))
    drafted = engine.generate(tokens, params, plan=engine.plan({"prompt_lookup": {}}))
    assert drafted.token_ids == plain.token_ids
    repeats = 256 - len(set(zip(plain.token_ids, plain.token_ids[1:], strict=False)))
    assert repeats > 64, "greedy decoding of a random model ends in a loop"
    assert drafted.stats["steps"] < 0.75 * plain.stats["steps"]
    assert drafted.stats["accepted_tokens"] == 256 - drafted.stats["steps"] > 0
    assert drafted.stats["plugin_ms"]["prompt_lookup"] > 0
