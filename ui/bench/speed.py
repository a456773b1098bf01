"""Prefill and decode speed of one request: through the engine, and of transformers' own model of the same shape.

A block is one prompt of random ids and then greedy decoding, the end token ignored. Blocks of the two take turns
(A B A B) in one process, so that a noisy machine is noisy to both. Engine time outside the forward comes from the
engine's accumulators, over decode steps only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from pitlane import Finished, SamplingParams, TextDelta, release_threads
from pitlane.ui.bench.summary import ratio, summary

if TYPE_CHECKING:
    from pitlane import Engine

PAUSE = 0.2  # seconds between blocks


@dataclass(slots=True)
class Blocks:
    """Measurements of one side, a number per block."""

    prefill_tokens_per_second: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)  # median per token
    outside_forward: list[float] = field(default_factory=list)  # share of decode steps' time, the engine's only

    def to_json(self) -> dict[str, Any]:
        names = ("prefill_tokens_per_second", "decode_ms", "outside_forward")
        return {name: summary(getattr(self, name)) for name in names if getattr(self, name)}


class Side(Protocol):
    """Whoever is measured."""

    blocks: Blocks

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        """One block: a prompt, and that many decode steps."""


class EngineSide:
    """The engine under its default plan. Each side gives its threads back when it is measured (`release_threads`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks = Blocks()

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        sampling = SamplingParams(max_tokens=num_steps + 1, ignore_eos=True)
        num_deltas, begin = 0, (0.0, 0.0)
        for event in self.engine.submit(token_ids, sampling):
            if isinstance(event, TextDelta):
                num_deltas += 1
                if num_deltas == 2:  # the prefill step is in the accumulators, decode steps follow
                    begin = self._accumulators()
            elif isinstance(event, Finished):
                stats = event.result.stats
        step, forward = (b - a for a, b in zip(begin, self._accumulators(), strict=True))
        self.engine.worker.call(release_threads).result()
        seconds = stats["prefill_ms"] / 1e3
        decode = stats["tpot_ms"]["p50"] or 0.0
        return Blocks([len(token_ids) / seconds], [decode], [1 - forward / step] if step > 0 else [])

    def _accumulators(self) -> tuple[float, float]:
        """Seconds of steps and of their forwards, read between two steps (they are added one after the other)."""
        found = (0.0, 0.0)
        for _ in range(100):
            found = (self.engine.loop.step_seconds, self.engine.loop.forward_seconds)
            time.sleep(2e-4)
            if found == (self.engine.loop.step_seconds, self.engine.loop.forward_seconds):
                break
        return found


class TransformersSide:
    """transformers' model of the same config with random weights: eager, attention as it chooses, the same dtype."""

    def __init__(self, engine: Engine) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from pitlane.ui.bench.peer_config import peer_config

        torch.manual_seed(0)
        loader = engine.loader
        config = peer_config(loader.source)
        self.model = AutoModelForCausalLM.from_config(config, dtype=loader.dtype).eval().to(loader.device)
        self.blocks = Blocks()

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        import torch

        device = self.model.device
        wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        times = []
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.tensor([token_ids], device=device), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            wait()
            prefill = time.perf_counter() - start
            for _ in range(num_steps):
                start = time.perf_counter()
                out = self.model(token, None, None, out.past_key_values, use_cache=True)  # by position: 5.24 renamed it
                token = out.logits[:, -1:].argmax(-1)
                token.item()  # a token that nobody reads is no token
                times.append(time.perf_counter() - start)
        release_threads()
        return Blocks([len(token_ids) / prefill], [1e3 * median(times)])


def measure_in_turn(
    sides: list[Side],
    vocab_size: int,
    num_prompt_tokens: int,
    num_steps: int,
    repeats: int,
    advance: Callable[[int, int], None],
) -> None:
    """Warm every side up, then fill their blocks: A B A B."""
    generator = random.Random(0)
    total = (repeats + 1) * len(sides)
    for repeat in range(repeats + 1):
        token_ids = [generator.randrange(vocab_size) for _ in range(num_prompt_tokens)]
        for index, side in enumerate(sides):
            advance(repeat * len(sides) + index, total)
            found = side.measure(token_ids, num_steps if repeat else min(4, num_steps))
            if repeat:
                side.blocks.prefill_tokens_per_second += found.prefill_tokens_per_second
                side.blocks.decode_ms += found.decode_ms
                side.blocks.outside_forward += found.outside_forward
            time.sleep(PAUSE)
    advance(total, total)


def compare(ours: Blocks, theirs: Blocks) -> dict[str, Any]:
    """How many times as fast: above 1 is ours."""
    return {
        "prefill": ratio(ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
        "decode": ratio(theirs.decode_ms, ours.decode_ms),
    }
