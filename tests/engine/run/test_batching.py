"""The same tokens whatever the batch: alone, among fifteen others, in chunks of any size, preempted, from cache, as samples.

On the bundled model. In float64 every id is equal, and in bfloat16 by the kernels in C; in float32 answers may part at a tie, which
is shown to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pitlane import Result, SamplingParams
from pitlane.kernels import linear
from pitlane.testing import assert_only_ties_differ

TEXT = (Path(__file__).resolve().parents[3] / "LICENSE").read_text()
BATCH = 16
CHUNKS = (7, 33)
MORE_CHUNKS = (1, 2, 3, 7, 16, 31, 32, 33, 61, 64, 100, 512)
MODES = pytest.mark.parametrize("mode", [{}, {"temperature": 0.9, "top_k": 20}], ids=["greedy", "sampled"])
AT_FULL_SIZE = [pytest.mark.slow, pytest.mark.timeout(3600)]
SIZES = pytest.mark.parametrize("count, max_tokens", [(6, 40), pytest.param(200, 64, marks=AT_FULL_SIZE)])
KERNELS: dict[str, dict[str, Any]] = {"packed_linear": {}, "paged_attention": {}, "fused_ops": {}}
TIE = 1e-4  # in logits; float32 batch shapes differ by about 1e-5 here


def prompts_of(engine: Any, count: int) -> list[list[int]]:
    """Of 8 to 240 tokens; every other one begins like the one before."""
    tokens = engine.tokenizer.encode(TEXT, add_special_tokens=False)
    stride = (len(tokens) - 260) // count
    return [[*tokens[(i - i % 2) * stride :][: 8 + 29 * i % 233], tokens[i * stride]] for i in range(count)]


@pytest.fixture
def bundled(make_engine: Callable[..., Any]) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        defaults: dict[str, Any] = {"plugins": {}, "kv_memory": 2**32}  # untouched pages cost nothing
        return make_engine("bundled", **{**defaults, **options})

    return make


def params_of(index: int, max_tokens: int, mode: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=index, ignore_eos=True, logprobs=50, **mode)


def in_batches(engine: Any, prompts: list[list[int]], params: list[SamplingParams], **options: Any) -> list[Result]:
    found: list[Result] = []
    for start in range(0, len(prompts), BATCH):
        found += engine.generate(prompts[start : start + BATCH], params[start : start + BATCH], **options)
    return found


@contextmanager
def chunks_of(engine: Any, size: int) -> Iterator[None]:
    scheduler = engine.lane_of(engine.default_plan).scheduler
    before, scheduler.max_step_tokens = scheduler.max_step_tokens, size
    yield
    scheduler.max_step_tokens = before


def all_equal(references: list[Result], found: list[Result], how: str) -> None:
    parted = [i for i, (a, b) in enumerate(zip(references, found, strict=True)) if a.token_ids != b.token_ids]
    assert not parted, f"{how}: the answers to prompts {parted} differ"


def every_way(
    bundled: Any, dtype: str, prompts: int, max_tokens: int, mode: dict[str, Any], same: Any, plugins: Any = ()
) -> None:
    """Answer all prompts in every way; `same(references, results, how)` compares with the answers alone."""
    options = {"dtype": dtype, "plugins": dict(plugins)}
    engine = bundled(**options)
    texts = prompts_of(engine, prompts)
    params = [params_of(index, max_tokens, mode) for index in range(prompts)]
    alone = [engine.generate(text, one) for text, one in zip(texts, params, strict=True)]
    same(alone, in_batches(engine, texts, params), "in batches of 16")
    for size in CHUNKS if prompts < 100 else MORE_CHUNKS:
        few = 32 if size < 16 else prompts
        with chunks_of(engine, size):
            same(alone[:few], in_batches(engine, texts[:few], params[:few]), f"in chunks of {size}")
    cached = engine.plan({**options["plugins"], "prefix_cache": {"save_documents": False}})
    for turn in ("filling", "from"):
        found = in_batches(engine, texts, params, plan=cached)
        same(alone, found, f"{turn} the cache")
    hits = sum(result.stats["cached_tokens"] > 0 for result in found)
    assert hits > 0.8 * prompts, "what was asked before is in the cache"
    per_block = 32 * engine.loader.needs.kv_per_token
    longest = -(-max(len(text) + max_tokens for text in texts) // 32)
    tight = bundled(**options, kv_memory=4 * per_block * (longest + 1))
    found = in_batches(tight, texts, params)
    same(alone, found, "preempted and resumed")
    preempted, lengths = sum(result.stats["preemptions"] > 0 for result in found), sorted(map(len, texts))
    assert preempted > prompts / 16, "there was too little room for all"
    print(
        f"{dtype} {mode or 'greedy'}: {prompts} prompts of {lengths[0]} to {lengths[-1]} tokens, {preempted} preempted"
    )


@SIZES
@MODES
def test_the_same_tokens_however_they_are_run(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    every_way(bundled, "float64", count, max_tokens, mode, all_equal)


@pytest.mark.skipif(bool(linear.unavailable()), reason=str(linear.unavailable()))
@SIZES
@MODES
def test_in_bfloat16_by_the_kernels_in_c_too(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    """Every operation keeps a row's order, however many rows stand beside it and however its prompt was cut."""
    every_way(bundled, "bfloat16", count, max_tokens, mode, all_equal, KERNELS)


@pytest.mark.slow
@SIZES
@MODES
def test_in_float32_only_ties_part(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    def same(references: list[Result], found: list[Result], how: str) -> None:
        parted = assert_only_ties_differ(references, found, SamplingParams(**mode), TIE)
        print(f"float32, {how}: {parted} of {len(found)} part at a tie")

    every_way(bundled, "float32", count, max_tokens, mode, same)


@SIZES
def test_samples_of_many_prompts_at_once(bundled: Callable[..., Any], count: int, max_tokens: int) -> None:
    engine = bundled(dtype="float64")
    prompts = prompts_of(engine, count // 4)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=1, ignore_eos=True, n=4)
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        for index, sample in enumerate(result.samples):
            one = SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=1, ignore_eos=True, sample_index=index)
            assert sample.token_ids == engine.generate(prompt, one).token_ids
