"""Prefill and decode speed of one request: in the engine, and in transformers' model of the same shape.

A block is a prompt of random ids, then greedy decoding past the end token. Blocks of both sides take turns (A B A B), so that noise
of the machine affects both; ui/bench/child.py runs each side in a process of its own. The share of time outside the forward comes
from the engine's accumulators, over decode steps only.
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
    import torch

    from pitlane import Engine
    from pitlane.ui.bench.peer_config import Shape

PAUSE = 0.2  # seconds between blocks


@dataclass(slots=True)
class Blocks:
    """Measurements of one side; a list has a number per block."""

    prefill_tokens_per_second: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)  # median per token
    outside_forward: list[float] = field(default_factory=list)  # share of the time of decode steps; of the engine only

    def to_json(self) -> dict[str, Any]:
        names = ("prefill_tokens_per_second", "decode_ms", "outside_forward")
        return {name: summary(getattr(self, name)) for name in names if getattr(self, name)}


class Side(Protocol):
    """A library under measurement."""

    blocks: Blocks

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        """Measure one block: a prompt, then `num_steps` decode steps."""


class EngineSide:
    """The engine under its default plan. After a block a side releases its threads (`release_threads`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks = Blocks()

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        sampling = SamplingParams(max_tokens=num_steps + 1, ignore_eos=True)
        num_deltas, begin = 0, (0.0, 0.0)
        for event in self.engine.submit(token_ids, sampling):
            if isinstance(event, TextDelta):
                num_deltas += 1
                if num_deltas == 2:  # the accumulators now hold the prefill step; decode steps follow
                    begin = self._accumulators()
            elif isinstance(event, Finished):
                stats = event.result.stats
        step, forward = (b - a for a, b in zip(begin, self._accumulators(), strict=True))
        self.engine.worker.call(release_threads).result()
        seconds = stats["prefill_ms"] / 1e3
        decode = stats["tpot_ms"]["p50"] or 0.0
        return Blocks([len(token_ids) / seconds], [decode], [1 - forward / step] if step > 0 else [])

    def _accumulators(self) -> tuple[float, float]:
        """Seconds of all steps and of their forwards. Read until they stand still: the engine adds to both at every step."""
        seconds = (0.0, 0.0)
        for _ in range(100):
            seconds = (self.engine.loop.step_seconds, self.engine.loop.forward_seconds)
            time.sleep(2e-4)
            if seconds == (self.engine.loop.step_seconds, self.engine.loop.forward_seconds):
                break
        return seconds


class TransformersSide:
    """transformers' model of the same config and dtype with random weights: eager, with its own choice of attention."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from pitlane.ui.bench.peer_config import peer_config

        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(peer_config(shape), dtype=dtype).eval().to(device)
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
                token.item()  # waits until the token is computed
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
    """Warm up every side, then measure their blocks in turn: A B A B."""
    generator = random.Random(0)
    total = (repeats + 1) * len(sides)
    for repeat in range(repeats + 1):
        token_ids = [generator.randrange(vocab_size) for _ in range(num_prompt_tokens)]
        for index, side in enumerate(sides):
            advance(repeat * len(sides) + index, total)
            blocks = side.measure(token_ids, num_steps if repeat else min(4, num_steps))
            if repeat:
                side.blocks.prefill_tokens_per_second += blocks.prefill_tokens_per_second
                side.blocks.decode_ms += blocks.decode_ms
                side.blocks.outside_forward += blocks.outside_forward
            time.sleep(PAUSE)
    advance(total, total)


def compare(ours: Blocks, theirs: Blocks) -> dict[str, Any]:
    """Ratios of speed; above 1 the engine is faster."""
    return {
        "prefill": ratio(ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
        "decode": ratio(theirs.decode_ms, ours.decode_ms),
    }
