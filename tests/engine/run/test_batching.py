"""A batch changes no token: alone, among fifteen other prompts, in chunks of any size, preempted, from a cache, as samples.

On the bundled model. In float64, and in bfloat16 with the kernels in C, every token id is equal. In float32 answers may differ at a
tie, and the test shows that it is a tie.
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
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 20}
MODES = pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
SIZES = pytest.mark.sizes("count, max_tokens", default=[(6, 32)], sample=[(16, 40)], whole=[(200, 64)])
KERNELS: dict[str, dict[str, Any]] = {"packed_linear": {}, "flash_attention": {}, "fused_ops": {}}
TIE = 1e-4  # in logits; float32 batch shapes differ by about 1e-5 here


def in_mode(mode: dict[str, Any]) -> pytest.MarkDecorator:
    """SIZES and MODES, but in the default tier one mode."""

    def name(value: Any) -> str | None:
        return ("sampled" if value else "greedy") if isinstance(value, dict) else None

    sample, whole = ([(*size, own) for own in (GREEDY, SAMPLED)] for size in ((16, 40), (200, 64)))
    return pytest.mark.sizes("count, max_tokens, mode", default=[(6, 32, mode)], sample=sample, whole=whole, ids=name)


def prompts_of(engine: Any, count: int) -> list[list[int]]:
    """Prompts of 8 to 240 tokens; every second prompt begins like the prompt before it."""
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
    return SamplingParams(max_tokens=max_tokens, seed=index, ignore_eos=True, **mode)


def in_batches(engine: Any, prompts: list[list[int]], params: list[SamplingParams], **options: Any) -> list[Result]:
    results: list[Result] = []
    for start in range(0, len(prompts), BATCH):
        results += engine.generate(prompts[start : start + BATCH], params[start : start + BATCH], **options)
    return results


@contextmanager
def chunks_of(engine: Any, size: int) -> Iterator[None]:
    scheduler = engine.lane_of(engine.default_plan).scheduler
    before, scheduler.max_step_tokens = scheduler.max_step_tokens, size
    yield
    scheduler.max_step_tokens = before


def all_equal(references: list[Result], results: list[Result], how: str) -> None:
    differing = [i for i, (a, b) in enumerate(zip(references, results, strict=True)) if a.token_ids != b.token_ids]
    assert not differing, f"{how}: the answers to prompts {differing} differ"


def every_way(
    bundled: Any, dtype: str, prompts: int, max_tokens: int, mode: dict[str, Any], same: Any, plugins: Any = ()
) -> None:
    """Answer all prompts in every way. same(references, results, how): compares with the answers to the prompts alone."""
    options = {"dtype": dtype, "plugins": dict(plugins)}
    engine = bundled(**options)
    texts = prompts_of(engine, prompts)
    params = [params_of(index, max_tokens, mode) for index in range(prompts)]
    alone = [engine.generate(text, own) for text, own in zip(texts, params, strict=True)]
    same(alone, in_batches(engine, texts, params), "in batches of 16")
    for size in CHUNKS if prompts < BATCH else MORE_CHUNKS:
        few = 32 if size < 16 else prompts
        with chunks_of(engine, size):
            same(alone[:few], in_batches(engine, texts[:few], params[:few]), f"in chunks of {size}")
    cached = engine.plan({**options["plugins"], "prefix_cache": {"save_documents": False}})
    for turn in ("filling", "from"):
        results = in_batches(engine, texts, params, plan=cached)
        same(alone, results, f"{turn} the cache")
    hits = sum(result.stats["cached_tokens"] > 0 for result in results)
    assert hits > 0.8 * prompts, "the cache holds the prompts of the first turn"
    per_block = 32 * engine.loader.needs.kv_per_token
    longest = -(-max(len(text) + max_tokens for text in texts) // 32)
    tight = bundled(**options, kv_memory=4 * per_block * (longest + 1))
    results = in_batches(tight, texts, params)
    same(alone, results, "preempted and resumed")
    preempted, lengths = sum(result.stats["preemptions"] > 0 for result in results), sorted(map(len, texts))
    assert preempted > prompts / 16, "the KV memory is too small for all prompts at once"
    print(
        f"{dtype} {mode or 'greedy'}: {prompts} prompts of {lengths[0]} to {lengths[-1]} tokens, {preempted} preempted"
    )


@in_mode(SAMPLED)
def test_the_same_tokens_in_every_way_to_run_them(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    every_way(bundled, "float64", count, max_tokens, mode, all_equal)


@pytest.mark.skipif(bool(linear.unavailable()), reason=str(linear.unavailable()))
@in_mode(GREEDY)
def test_the_same_tokens_in_bfloat16_with_the_kernels_in_c(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    """The kernels sum a row in the same order for any number of rows and any cut of the prompt."""
    every_way(bundled, "bfloat16", count, max_tokens, mode, all_equal, KERNELS)


@pytest.mark.slow
@SIZES
@MODES
def test_in_float32_answers_differ_only_at_ties(
    bundled: Callable[..., Any], count: int, max_tokens: int, mode: dict[str, Any]
) -> None:
    def same(references: list[Result], results: list[Result], how: str) -> None:
        num_differing = assert_only_ties_differ(references, results, SamplingParams(**mode), TIE)
        print(f"float32, {how}: {num_differing} of {len(results)} differ at a tie")

    every_way(bundled, "float32", count, max_tokens, {**mode, "logprobs": 50}, same)


@SIZES
def test_samples_of_many_prompts_at_once(bundled: Callable[..., Any], count: int, max_tokens: int) -> None:
    engine = bundled(dtype="float64")
    prompts = prompts_of(engine, count // 4)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=1, ignore_eos=True, n=4)
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        for index, sample in enumerate(result.samples):
            own = SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=1, ignore_eos=True, sample_index=index)
            assert sample.token_ids == engine.generate(prompt, own).token_ids
