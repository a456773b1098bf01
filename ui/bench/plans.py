"""Comparison of plugin sets on the same prompts: tokens per step, speed, and whether the ids are the same.

Sets take turns on every prompt (A B A B); all sets are compared with the first one. Every repeat of a set has its own salt, and the
engine has an empty data folder: a plugin remembers only earlier prompts of the same set and repeat.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pitlane import Finished, SamplingParams, TextDelta
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home
from pitlane.ui.bench.summary import ratio, summary

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt

PROMPTS = (
    "Repeat this list word for word, twice: apples, pears, plums, cherries, apricots, peaches, quinces, grapes.",
    'Copy the text between the quotes: "The committee met on Tuesday, and the committee will meet on Thursday."',
    "Write the numbers from one to thirty as words, with commas between them.",
    "Explain in a few sentences why the sky is blue.",
    "Correct the spelling and change nothing else: The quik brown fox jumps ovr the lazy dog, and teh dog sleeps on.",
    "Tell a short story about a lighthouse.",
)


@dataclass(slots=True)
class PlanRow:
    """Measurements of one plugin set; a list has a number per repeat."""

    label: str
    plan: Plan
    tokens_per_second: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_paused: int = 0
    token_ids: list[list[int]] = field(default_factory=list)

    def to_json(self, first: PlanRow) -> dict[str, Any]:
        return {
            "plugins": self.label,
            "exactness": self.plan.exactness,
            "tokens_per_step": round(self.num_tokens / self.num_steps, 3),
            "draft_tokens": self.num_drafted,
            "accepted_tokens": self.num_accepted,
            "answers_with_a_pause": self.num_paused,
            "tokens_per_second": summary(self.tokens_per_second),
            "speed": ratio(self.tokens_per_second, first.tokens_per_second),
            "ttft_ms": summary(self.ttft_ms),
            "identical": self.token_ids == first.token_ids,
            "identical_answers": sum(a == b for a, b in zip(self.token_ids, first.token_ids, strict=True)),
            "answers": len(self.token_ids),
        }


@contextmanager
def own_home() -> Iterator[None]:
    """Give engines a data folder without saved KV inside the block, and delete it afterwards; fetched models are in it too."""
    before = os.environ.get("PITLANE_HOME")
    with TemporaryDirectory(prefix="pitlane-bench-") as folder:
        with suppress(StorageError, OSError):  # without links the models are fetched and decoded again
            for name in ("models", "cache"):
                (home() / name).mkdir(exist_ok=True)
                (Path(folder) / name).symlink_to(home() / name)
        os.environ["PITLANE_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["PITLANE_HOME"]
            if before is not None:
                os.environ["PITLANE_HOME"] = before


def compare_plans(
    engine: Engine,
    plans: dict[str, Plan],
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    repeats: int,
    advance: Callable[[int, int], None],
) -> list[PlanRow]:
    """Answer every prompt under every plan: once to warm up, then `repeats` times."""
    rows = [PlanRow(label, plan) for label, plan in plans.items()]
    total, done = (repeats + 1) * len(prompts) * len(rows), 0
    for repeat in range(repeats + 1):
        answers: dict[str, list[_Answer]] = {row.label: [] for row in rows}
        for prompt in prompts:
            for row in rows:
                advance(done, total)
                done += 1
                answers[row.label].append(_answer(engine, prompt, sampling, row.plan, f"{repeat} {row.label}"))
        if repeat:
            for row in rows:
                _add(row, answers[row.label])
    advance(total, total)
    return rows


@dataclass(slots=True)
class _Answer:
    token_ids: list[int]
    num_steps: int
    stats: dict[str, Any]


def _answer(engine: Engine, prompt: Prompt, sampling: SamplingParams, plan: Plan, salt: str) -> _Answer:
    num_steps = 0
    for event in engine.submit(prompt, sampling, plan=plan, salt=salt):
        if isinstance(event, TextDelta) and event.token_ids:
            num_steps += 1
        elif isinstance(event, Finished):
            return _Answer(event.result.token_ids, num_steps, event.result.stats)
    raise AssertionError("a stream ends with Finished or an error")


def _add(row: PlanRow, answers: list[_Answer]) -> None:
    decoded = sum(max(0, len(answer.token_ids) - 1) for answer in answers)
    seconds = sum(answer.stats["decode_ms"] for answer in answers) / 1e3
    row.tokens_per_second.append(decoded / seconds if seconds > 0 else 0.0)
    row.ttft_ms.append(median(answer.stats["ttft_ms"] for answer in answers))
    row.num_tokens += sum(len(answer.token_ids) for answer in answers)
    row.num_steps += sum(answer.num_steps for answer in answers)
    row.num_drafted += sum(answer.stats["draft_tokens"] for answer in answers)
    row.num_accepted += sum(answer.stats["accepted_tokens"] for answer in answers)
    row.num_paused += sum(bool(answer.stats["paused"]) for answer in answers)
    row.token_ids += [answer.token_ids for answer in answers]
