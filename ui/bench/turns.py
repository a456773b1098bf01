"""Answers of several plans to the same prompts, in turn (A B A B), so that noise of the machine meets all plans.

A lap is the answers of one plan in one repeat. The first lap of every plan loads weights and warms up, and is not kept. Every lap
has its own salt: a plugin remembers nothing from another lap, so no lap replays an earlier answer. `known` tokens, such as a
document, are read before every lap by the plans that keep KV; this reading is not measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from pitlane import BadOption, Finished, SamplingParams, TextDelta

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt, Result, Stream

Advance = Callable[[int, int], None]


class Cancelled(Exception):
    """`Turns.cancel` was called."""


@dataclass(slots=True)
class Lap:
    """Answers of one plan to all prompts in one repeat. num_steps: steps that gave tokens."""

    results: list[Result] = field(default_factory=list)
    num_steps: int = 0

    @property
    def token_ids(self) -> list[list[int]]:
        return [result.token_ids for result in self.results]

    @property
    def num_tokens(self) -> int:
        return sum(len(result.token_ids) for result in self.results)

    @property
    def num_decoded(self) -> int:
        """Tokens after the first token of every answer."""
        return sum(max(0, len(result.token_ids) - 1) for result in self.results)

    @property
    def decode_ms(self) -> float:
        return float(self.total("decode_ms"))

    @property
    def tokens_per_second(self) -> float:
        """0 if no answer has a second token."""
        return 1e3 * self.num_decoded / self.decode_ms if self.num_decoded and self.decode_ms > 0 else 0.0

    @property
    def ttft_ms(self) -> float:
        """The median over the prompts."""
        return float(median(result.stats["ttft_ms"] for result in self.results))

    def total(self, key: str) -> Any:
        """The sum of a number of the stats over all answers."""
        return sum(result.stats[key] for result in self.results)


class Turns:
    """Runs laps of several plans in turn. `cancel` may be called from another thread.

    advance(done, total) is called before every answer, and once at the end. salt: begins the salt of every lap.
    """

    def __init__(
        self,
        engine: Engine,
        plans: Mapping[str, Plan],
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        repeats: int,
        advance: Advance,
        *,
        known: Sequence[Sequence[int]] = (),
        salt: str = "",
    ) -> None:
        self.engine, self.plans, self.prompts, self.sampling, self.repeats = engine, plans, prompts, sampling, repeats
        self.advance, self.known, self.salt = advance, known, salt
        self.num_extra = 0  # steps of progress that the caller adds behind the laps
        self._done = 0
        self._stream: Stream | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return (self.repeats + 1) * len(self.prompts) * len(self.plans) + self.num_extra

    def run(self) -> dict[str, list[Lap]]:
        """Return the laps of every plan. Raises Cancelled, or the PitlaneError of a request."""
        laps: dict[str, list[Lap]] = {label: [] for label in self.plans}
        for repeat in range(self.repeats + 1):
            current = {label: Lap() for label in self.plans}
            for label, plan in self.plans.items():
                self._read_known(plan, self._salt(repeat, label))
            for prompt in self.prompts:
                for label, plan in self.plans.items():
                    self.step()
                    self._answer(current[label], prompt, plan, self._salt(repeat, label))
            if repeat:
                for label, lap in current.items():
                    laps[label].append(lap)
        return laps

    def cancel(self) -> None:
        """End the running request before its next step; `run` raises Cancelled."""
        with self._lock:
            self._is_cancelled = True
            if self._stream is not None:
                self._stream.abort()

    def step(self) -> None:
        """Report progress. Raises Cancelled."""
        if self._is_cancelled:
            raise Cancelled
        self.advance(self._done, self.total)
        self._done += 1

    def generate(self, prompt: Prompt | Sequence[int], sampling: SamplingParams, plan: Plan, salt: str) -> Lap:
        """Answer one prompt. Raises Cancelled if `cancel` was called meanwhile."""
        lap = Lap()
        self._follow(lap, prompt, sampling, plan, salt)
        return lap

    def _salt(self, repeat: int, label: str) -> str:
        return f"{self.salt}{repeat} {label}"

    def _read_known(self, plan: Plan, salt: str) -> None:
        """Compute the KV of the known tokens, if a plugin of the plan keeps it."""
        if plan.hook("match_prefix"):
            for token_ids in self.known:
                self._follow(Lap(), token_ids, SamplingParams(max_tokens=1), plan, salt)

    def _answer(self, lap: Lap, prompt: Prompt, plan: Plan, salt: str) -> None:
        self._follow(lap, prompt, self.sampling, plan, salt)

    def _follow(
        self, lap: Lap, prompt: Prompt | Sequence[int], sampling: SamplingParams, plan: Plan, salt: str
    ) -> None:
        with self.engine.submit(prompt, sampling, plan=plan, salt=salt) as stream:
            with self._lock:
                self._stream = stream
                if self._is_cancelled:
                    stream.abort()
            for event in stream:
                if isinstance(event, TextDelta) and event.token_ids:
                    lap.num_steps += 1
                elif isinstance(event, Finished):
                    lap.results.append(event.result)
        if self._is_cancelled:
            raise Cancelled


def check_lanes(engine: Engine, plans: Mapping[str, Plan]) -> None:
    """Raise BadOption if the plans need more lanes than an engine keeps open: every turn would load weights."""
    num_lanes = len({plan.lane_key for plan in plans.values()})
    if num_lanes > engine.max_lanes:
        raise BadOption(
            f"these plans run the model in {num_lanes} ways, and an engine keeps {engine.max_lanes} of them open; "
            "compare fewer plans at once"
        )
