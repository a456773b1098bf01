"""Tokens per second of many requests at once, against one request and against transformers' batches. Needs a quiet machine.

The sides take turns in one process. Equal lengths are compared by the median decode step, mixed lengths by the wall clock from the
first submit to the last token, prompts included. `pytest -m slow -s tests/speed/test_throughput.py` prints the tables.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

from pitlane import Engine, SamplingParams, release_threads
from pitlane.ui.bench.speed import TransformersSide

pytestmark = pytest.mark.slow
MODEL, PROMPT, OUTPUT, BATCH = "random:llama-1b", 128, 128, 16
LENGTHS = [16 + 240 * i // 31 for i in range(32)]  # 16 to 256, 136 on average
STEPS = 24  # decode steps of transformers per block


@pytest.fixture(scope="module")
def engine(without_cache: Any) -> Iterator[Any]:
    with Engine(MODEL, dtype="bfloat16", plugins=without_cache, context=1024, threads=2) as made:
        yield made
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def peer(engine: Engine) -> Any:
    return TransformersSide(engine.loader.source, engine.loader.dtype, engine.loader.device).model


def prompts(count: int, lengths: list[int]) -> list[list[int]]:
    generator = random.Random(count)
    return [[generator.randrange(300, 31000) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


def submit(engine: Engine, token_ids: list[list[int]], outputs: list[int]) -> tuple[float, float]:
    """Submit all prompts at once. Returns seconds of wall clock, and median seconds of a decode step."""
    started = perf_counter()
    sampling = [SamplingParams(max_tokens=output, ignore_eos=True) for output in outputs]
    streams = [engine.submit(ids, params) for ids, params in zip(token_ids, sampling, strict=True)]
    results = [stream.result() for stream in streams]
    seconds = perf_counter() - started
    engine.worker.call(release_threads).result()  # the other side runs without this side's threads
    assert [len(result.token_ids) for result in results] == outputs
    return seconds, median(result.stats["tpot_ms"]["p50"] for result in results) / 1e3


def equal_batch(peer: Any, token_ids: list[list[int]]) -> float:
    """Median seconds of a decode step of an equal-length batch."""
    times = []
    with torch.inference_mode():
        out = peer(torch.tensor(token_ids), use_cache=True, logits_to_keep=1)
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            started = perf_counter()
            out = peer(token, None, None, out.past_key_values, use_cache=True)  # by position: 5.24 renamed the argument
            times.append(perf_counter() - started)
    release_threads()
    return median(times)


def padded_batch(peer: Any, token_ids: list[list[int]], max_new_tokens: int) -> float:
    """Seconds of `generate` over prompts padded on the left. Every answer runs as long as the longest."""
    width = max(map(len, token_ids))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in token_ids])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in token_ids])
    started = perf_counter()
    with torch.inference_mode():
        out = peer.generate(
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    seconds = perf_counter() - started
    release_threads()
    assert out.shape == (len(token_ids), width + max_new_tokens)
    return seconds


def test_sixteen_requests_beside_one_and_beside_an_equal_batch(engine: Engine, peer: Any) -> None:
    single, many, peers = [], [], []
    for _ in range(2):
        single.append(submit(engine, prompts(1, [PROMPT]), [OUTPUT])[1])
        many.append(submit(engine, prompts(BATCH, [PROMPT]), [OUTPUT] * BATCH)[1] / BATCH)
        peers.append(equal_batch(peer, prompts(BATCH, [PROMPT])) / BATCH)
    over_single, over_peer = median(single) / median(many), median(peers) / median(many)
    print(f"\ndecode tok/s: one {1 / median(single):.1f}, {BATCH} {1 / median(many):.1f} ({over_single:.2f} times one)")
    print(f"transformers, {BATCH}: {1 / median(peers):.1f}; pitlane {over_peer:.2f} times as fast")
    print("ms a step:", *([f"{1e3 * x:.1f}" for x in side] for side in (single, [BATCH * x for x in many])))
    assert over_peer >= 1.05
    assert over_single >= 12


def test_mixed_lengths_beside_padded_generate(engine: Engine, peer: Any) -> None:
    token_ids, outputs = prompts(32, [32, 128, 64, 96]), LENGTHS[:]
    random.Random(0).shuffle(outputs)
    own_seconds = [submit(engine, token_ids, outputs)[0]]
    peer_seconds = padded_batch(peer, token_ids, max(outputs))
    own_seconds.append(submit(engine, token_ids, outputs)[0])
    ratio, total = peer_seconds / median(own_seconds), sum(outputs)
    print(
        f"\n{total} tokens of 32 requests: pitlane {total / median(own_seconds):.1f} tok/s, transformers {total / peer_seconds:.1f}"
    )
    ratios = [peer_seconds / seconds for seconds in own_seconds]
    print(f"{ratio:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    assert ratio >= 1.5


def test_batch_of_64_on_the_bundled_model() -> None:
    """The loop and attention must leave most of the gain of a batch: at least 6 times the tokens per second of one request."""
    with Engine("bundled", dtype="float32", plugins={}) as engine:
        single, many = [], []
        for _ in range(3):
            single.append(submit(engine, [[1, *range(300, 399)]], [128])[1])
            many.append(submit(engine, [[1 + i, *range(300, 399)] for i in range(64)], [128] * 64)[1] / 64)
    ratio = median(single) / median(many)
    print(f"\nbundled, decode tok/s: one {1 / median(single):.0f}, 64 {1 / median(many):.0f} ({ratio:.1f} times one)")
    assert ratio >= 6
