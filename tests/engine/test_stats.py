"""Stats: the times of the request itself bound the milliseconds that a plugin claims to have bought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.sequence import Timing

PARAMS = SamplingParams(max_tokens=48, ignore_eos=True)


def test_a_drafter_claims_no_more_than_its_accepted_tokens_took_in_this_run(
    make_engine: Callable[..., Any], always_draft: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(plugins={"prompt_lookup": {}})
    prompt = [5, 6, 7, 8] * 12
    engine.generate(prompt, PARAMS)  # the next request drafts from this answer
    monkeypatch.setattr(
        Pacing, "forward_seconds", lambda pacing, num_tokens: 10.0
    )  # as after a time when the machine was busy
    stats = engine.generate(prompt, PARAMS).stats
    assert stats["accepted_tokens"] > 10
    num_steps = stats["steps"] - 1  # the first step reads the prompt
    bound = stats["accepted_tokens"] * stats["decode_ms"] / num_steps
    assert 0 < stats["bought_ms"]["prompt_lookup"]["ms"] <= bound * 1.01


def test_a_prefix_hit_claims_no_more_than_its_tokens_would_have_taken_in_this_run(
    make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(plugins={"prefix_cache": {}})
    prompt = [number % 251 for number in range(300)]
    engine.generate(prompt, PARAMS)
    monkeypatch.setattr(Pacing, "seconds_per_prompt_token", property(lambda pacing: 10.0))
    stats = engine.generate([*prompt[:256], *range(44)], PARAMS).stats
    computed = stats["prompt_tokens"] - stats["cached_tokens"]
    assert stats["cached_tokens"] >= 256 and computed > 0
    assert (
        0 < stats["bought_ms"]["prefix_cache"]["ms"] <= stats["cached_tokens"] * stats["prefill_ms"] / computed * 1.01
    )


def test_tokens_of_one_step_have_no_gap_and_steps_keep_their_length_late_in_a_long_answer() -> None:
    timing = Timing(submitted=0.0)
    timing.add_tokens(2, 1e6)
    timing.add_tokens(3, 1e6 + 0.001)
    timing.add_tokens(1, 1e6 + 0.003)
    assert list(timing.gaps) == pytest.approx([0, 0.001, 0, 0, 0.002], rel=1e-5, abs=0)
    assert timing.gaps.itemsize == 4
