"""Prompt lookup: the n-gram index, chains and trees of what it finds, fewer steps where the text repeats."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, Limits, SamplingParams, Sequence
from pitlane.engine.types import Timing
from pitlane.plugins.prompt_lookup import NgramIndex, PromptLookup


def index_of(min_ngram: int, max_ngram: int, num_candidates: int = 1) -> NgramIndex:
    return NgramIndex(PromptLookup.Options(min_ngram=min_ngram, max_ngram=max_ngram, num_candidates=num_candidates))


def propose(plugin: PromptLookup, token_ids: list[int], limit: int) -> Draft | None:
    nothing = cast(Any, None)
    seq = Sequence(0, token_ids, len(token_ids), SamplingParams(), 0, nothing, nothing, Timing(0.0), frozenset())
    return plugin.propose([seq], Limits([limit], nothing))[0]


def test_index_finds_the_latest_longest_match() -> None:
    index = index_of(1, 3)
    assert index.find([1, 2, 3]) == []
    assert index.find([1, 2, 3, 9, 2, 3]) == [3]  # behind the earlier "2 3"
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3]) == [6]  # the latest one
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3]) == [3]  # a longer match beats a later shorter one
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3, 8]) == []


def test_several_matches_come_the_longest_and_latest_first_and_once() -> None:
    tokens = [1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3]
    assert index_of(1, 3, 2).find(tokens) == [3, 9]
    assert index_of(1, 3, 8).find(tokens) == [3, 9, 6]
    assert index_of(3, 3, 8).find(tokens) == [3]


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_index_grows_in_one_pass(num_candidates: int) -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(300)]
    grown = index_of(2, 4, num_candidates)
    for stop in range(1, len(tokens) + 1):
        assert grown.find(tokens[:stop]) == index_of(2, 4, num_candidates).find(tokens[:stop])


def test_one_continuation_is_a_chain_and_several_are_a_tree() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2]
    one = PromptLookup(PromptLookup.parse_options({}))
    assert propose(one, tokens, 3) == Draft([3, 6, 7])
    several = PromptLookup(PromptLookup.parse_options({"num_candidates": 4}))
    assert propose(several, tokens, 3) == Draft([3, 6, 7, 4, 5], [-1, 0, 1, 0, 3])
    assert propose(several, tokens[:7], 3) == Draft([3, 4, 5])
    for plugin in (one, several):
        assert propose(plugin, tokens, 0) is None
        assert propose(plugin, [1, 2, 3], 5) is None
    assert propose(one, list(range(50)) * 2, 64) == propose(one, list(range(50)) * 2, 8), "its own limit counts too"


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
