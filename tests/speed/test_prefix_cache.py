"""The cost of the prefix cache without hits, and its gain when sixteen questions share a document. Needs a quiet machine.

Run with `pytest -m slow -s tests/speed/test_prefix_cache.py`, which prints the figures of docs/benchmarks.md.
"""

from __future__ import annotations

import random
from time import perf_counter
from typing import Any

import pytest

from pitlane import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODELS = [("bundled", "float32"), ("random:llama-1b", "bfloat16")]


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 4000) for _ in range(length)]


@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_its_cost_without_a_hit_is_below_a_hundredth(make_engine: Any, model: str, dtype: str) -> None:
    engine = make_engine(model, dtype=dtype, plugins=["prefix_cache"])
    count, sampling = (16, 64) if model == "bundled" else (3, 16), SamplingParams(ignore_eos=True, max_tokens=64)
    engine.generate(tokens(0, 64), sampling)
    before, spent = engine.loop.step_seconds, 0.0
    for seed in range(1, 1 + count[0]):
        result = engine.generate(tokens(seed, 400), SamplingParams(max_tokens=count[1], ignore_eos=True))
        assert result.stats["cached_tokens"] <= 1
        spent += result.stats["plugin_ms"]["prefix_cache"] / 1e3
    share = spent / (engine.loop.step_seconds - before)
    print(f"\n{model}: {share:.3%} of the time of the steps")
    assert share < 0.01


def test_sixteen_questions_on_one_document(make_engine: Any) -> None:
    """Sixteen requests at once, end to end: one computes the document, the others wait for it."""
    seconds: dict[str, float] = {}
    prompts = [tokens(0, 1024) + tokens(seed, 16) for seed in range(1, 17)]
    for name in ("prefix_cache", ""):
        engine = make_engine("random:llama-1b", dtype="bfloat16", plugins=[name] if name else [], threads=2)
        engine.generate(tokens(99, 300), SamplingParams(max_tokens=4))
        started = perf_counter()
        streams = [engine.submit(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts]
        cached = [stream.result().stats["cached_tokens"] for stream in streams]
        seconds[name] = perf_counter() - started
        assert sum(count == 0 for count in cached) == (1 if name else 16)
        engine.close()
    ratio = seconds[""] / seconds["prefix_cache"]
    print(f"\n{seconds['']:.1f} s without, {seconds['prefix_cache']:.1f} s with, {ratio:.1f} times as fast")
    assert ratio >= 5
