"""Prompt lookup: the n-gram index, drafts as chains and trees, earlier answers, fewer steps on text that repeats."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, Limits, SamplingParams, Sequence
from pitlane.engine.sequence import Timing
from pitlane.plugins.prompt_lookup import MAX_USERS, PromptLookup


def plugin_of(**options: int) -> PromptLookup:
    return PromptLookup(PromptLookup.parse_options(options))


def sequence(token_ids: list[int], num_prompt_tokens: int | None = None, salt: str = "") -> Sequence:
    count = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
    nothing = cast(Any, None)
    return Sequence(0, token_ids, count, SamplingParams(), 0, nothing, nothing, Timing(0.0), frozenset(), salt=salt)


def propose(plugin: PromptLookup, token_ids: list[int], limit: int, salt: str = "") -> Draft | None:
    return plugin.propose([sequence(token_ids, salt=salt)], Limits([limit], cast(Any, None)))[0]


def chains(tokens: list[int], **options: int) -> list[list[int]]:
    """Continuations of a single token, the best first."""
    draft = propose(plugin_of(num_draft_tokens=1, history=0, **options), tokens, 1)
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
        draft = propose(plugin_of(min_ngram=1, max_ngram=3, num_candidates=count, num_draft_tokens=1), tokens, 9)
        assert draft == Draft(expected, [-1] * len(expected))
    assert chains(tokens, min_ngram=3, max_ngram=3, num_candidates=8) == [[9]]


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_an_index_that_grows_token_by_token_drafts_as_a_new_index(num_candidates: int) -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(300)]
    grown, seq = plugin_of(num_candidates=num_candidates), sequence(tokens[:1])
    limits = Limits([8], cast(Any, None))
    for stop in range(2, len(tokens) + 1):
        seq.token_ids.append(tokens[stop - 1])
        draft = grown.propose([seq], limits)[0]
        assert draft == propose(plugin_of(num_candidates=num_candidates), tokens[:stop], 8)


def test_earlier_answers_to_the_same_user_are_drafted_from() -> None:
    plugin = plugin_of(num_draft_tokens=4)
    plugin.sequence_finished(sequence([50, 51, 8, 9, 1, 2, 3, 4, 5], num_prompt_tokens=4, salt="ann"))
    assert propose(plugin, [60, 8, 9], 4, salt="ann") == Draft([1, 2, 3, 4]), "the match begins in the prompt"
    assert propose(plugin, [60, 3, 4], 4, salt="ann") == Draft([5]), "a draft ends with the answer"
    assert propose(plugin, [60, 4, 5], 4, salt="ann") is None
    assert propose(plugin, [3, 4, 7, 3, 4], 4, salt="ann") == Draft([7, 3, 4]), "its own text comes first"
    assert propose(plugin, [2, 3, 4, 60, 3, 4, 7, 2, 3, 4], 1, salt="ann") == Draft([60])
    assert propose(plugin, [60, 8, 9], 4, salt="bob") is propose(plugin, [60, 8, 9], 4) is None, (
        "other users get no draft"
    )


def test_accepted_tokens_that_came_from_earlier_answers_are_noted() -> None:
    plugin, limits = plugin_of(num_draft_tokens=4), Limits([4], cast(Any, None))
    plugin.sequence_finished(sequence([8, 9, 1, 2, 3, 4], num_prompt_tokens=2))
    seq = sequence([50, 51, 60, 50, 51, 70, 8, 9], num_prompt_tokens=8)

    def step(accepted: int, *token_ids: int) -> None:
        plugin.propose([seq], limits)
        seq.timing.num_accepted_tokens += accepted
        seq.token_ids.extend(token_ids)

    step(3, 1, 2, 3, 50)  # three of the four tokens of the earlier answer
    step(0, 51)  # no match
    step(2, 70, 8, 5)  # from its own text
    plugin.sequence_finished(seq)
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
    plugin = plugin_of(history=0)
    plugin.sequence_finished(sequence([8, 9, 1, 2, 3], num_prompt_tokens=2))
    assert propose(plugin, [8, 9], 4) is None and not plugin.histories
    plugin = plugin_of()
    plugin.sequence_finished(sequence([8, 9, 1, 2, 3]))  # a prompt alone
    assert not plugin.histories


def test_the_memory_of_answers_is_bounded_and_the_oldest_goes_first() -> None:
    plugin = plugin_of(history=100)
    for start in range(1000, 9000, 10):
        plugin.sequence_finished(sequence(list(range(start, start + 10)), num_prompt_tokens=2))
    assert 50 <= sum(len(index.token_ids) for index in plugin.histories[""].indexes) <= 120
    assert propose(plugin, [8952, 8953], 2) == Draft([8954, 8955])
    assert propose(plugin, [8802, 8803], 2) is None
    plugin.sequence_finished(sequence(list(range(500)), num_prompt_tokens=2))
    assert propose(plugin, [497, 498], 2) == Draft([499]), "the end of a long answer is kept"
    least = plugin_of(history=1)
    least.sequence_finished(sequence(list(range(500)), num_prompt_tokens=2))
    assert sum(len(index.token_ids) for index in least.histories[""].indexes) <= 2
    for user in range(MAX_USERS):
        plugin.sequence_finished(sequence([1, 2, 3, 4], num_prompt_tokens=2, salt=str(user)))
    assert len(plugin.histories) == MAX_USERS and "" not in plugin.histories


def test_one_continuation_is_a_chain_and_several_are_a_tree() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2]
    single = plugin_of()
    assert propose(single, tokens, 3) == Draft([3, 6, 7])
    several = plugin_of(num_candidates=4)
    assert propose(several, tokens, 3) == Draft([3, 6, 7, 4, 5], [-1, 0, 1, 0, 3])
    assert propose(several, tokens[:7], 3) == Draft([3, 4, 5])
    for plugin in (single, several):
        assert propose(plugin, tokens, 0) is None
        assert propose(plugin, [1, 2, 3], 5) is None
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
