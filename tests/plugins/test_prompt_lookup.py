"""Prompt lookup: the n-gram index, identical tokens, fewer steps on quoting prompts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pitlane import BadOption, Result, SamplingParams
from pitlane.plugins.prompt_lookup import NgramIndex, PromptLookup
from pitlane.testing import assert_only_ties_differ


def test_index_finds_the_latest_longest_match() -> None:
    index = NgramIndex(1, 3)
    assert index.find([1, 2, 3]) is None
    assert index.find([1, 2, 3, 9, 2, 3]) == 3  # behind the earlier "2 3"
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3]) == 6  # the latest one
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3]) == 3  # a longer match beats a later shorter one
    assert index.find([1, 2, 3, 9, 2, 3, 7, 2, 3, 5, 1, 2, 3, 8]) is None


def test_index_grows_in_one_pass() -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(300)]
    grown = NgramIndex(2, 4)
    for stop in range(1, len(tokens) + 1):
        fresh = NgramIndex(2, 4)
        assert grown.find(tokens[:stop]) == fresh.find(tokens[:stop])


def test_bad_options_are_named() -> None:
    with pytest.raises(BadOption, match="min_ngram must be at most max_ngram, got 5 and 4"):
        PromptLookup.parse_options({"min_ngram": 5})
    with pytest.raises(BadOption, match="prompt_lookup.num_draft_tokens = '0'"):
        PromptLookup.parse_options({"num_draft_tokens": "0"})
    with pytest.raises(BadOption, match="no option 'ngrams'; its options are: num_draft_tokens"):
        PromptLookup.parse_options({"ngrams": 3})


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


def both(engine: Any, tokens: list[int], count: int, **sampling: Any) -> tuple[list[Result], list[Result]]:
    """Answers of up to 256 tokens to `count` prompts cut from `tokens`, in batches: without and with prompt lookup."""
    room = engine.loader.context
    answer = min(256, room * 3 // 4)
    prompts = [tokens[i * 11 : i * 11 + 8 + i % (room - answer - 9)] for i in range(count)]
    found = []
    for settings in ({}, {"prompt_lookup": {"min_ngram": 1}}):
        params = [SamplingParams(max_tokens=answer, seed=i, ignore_eos=True, **sampling) for i in range(count)]
        streams = [engine.submit(p, s, plan=engine.plan(settings)) for p, s in zip(prompts, params, strict=True)]
        found.append([stream.result() for stream in streams])
    plain, drafted = found
    assert all(len(r.token_ids) == answer for r in plain)
    assert sum(r.stats["accepted_tokens"] for r in drafted) > count
    return plain, drafted


def story(engine: Any, shared_data: Any) -> list[int]:
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    tokens: list[int] = engine.tokenizer.encode(text, add_special_tokens=False)
    return tokens


SAMPLING = pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20}], ids=["greedy", "sampled"])
MODELS = pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105", "bundled"])


@SAMPLING
def test_same_tokens(make_engine: Any, shared_data: Any, sampling: dict[str, Any]) -> None:
    engine = make_engine(str(shared_data / "models" / "stories260K"), kv_memory=2**30)
    plain, drafted = both(engine, story(engine, shared_data), 6, **sampling)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]


@pytest.mark.slow
@MODELS
@SAMPLING
def test_same_tokens_on_64_prompts(make_engine: Any, shared_data: Any, model: str, sampling: dict[str, Any]) -> None:
    folder = shared_data / "models" / model
    engine = make_engine(str(folder) if folder.is_dir() else model, kv_memory=2**30)
    plain, drafted = both(engine, story(engine, shared_data), 64, **sampling)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]


@pytest.mark.slow
@MODELS
@SAMPLING
def test_only_ties_differ_in_float32(make_engine: Any, shared_data: Any, model: str, sampling: dict[str, Any]) -> None:
    folder = shared_data / "models" / model
    engine = make_engine(str(folder) if folder.is_dir() else model, dtype="float32", kv_memory=2**30)
    plain, drafted = both(engine, story(engine, shared_data), 64, logprobs=50, **sampling)
    parted = assert_only_ties_differ(plain, drafted, SamplingParams(**sampling), 1e-4)
    print(f"{model}: {parted} of 64 answers part, each at a tie below 1e-4 of a logit")
