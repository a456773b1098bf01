"""Comparison of plugin sets on the same prompts: tokens per step, speed, and whether the ids are the same.

The sets take turns (ui/bench/turns.py), and all sets are compared with the first one. The engine has an empty data folder: a plugin
remembers only earlier prompts of the same set and repeat. `pitlane compare` looks at one prompt more closely.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pitlane.storage.errors import StorageError
from pitlane.storage.home import home
from pitlane.ui.bench.summary import ratio, summary
from pitlane.ui.bench.turns import Advance, Lap, Turns

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt, SamplingParams

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
    """The laps of one plugin set."""

    label: str
    plan: Plan
    laps: list[Lap]

    @property
    def token_ids(self) -> list[list[int]]:
        return [ids for lap in self.laps for ids in lap.token_ids]

    def to_json(self, first: PlanRow) -> dict[str, Any]:
        speeds, firsts = [[lap.tokens_per_second for lap in row.laps] for row in (self, first)]
        pairs = zip(self.token_ids, first.token_ids, strict=True)
        return {
            "plugins": self.label,
            "exactness": self.plan.exactness,
            "tokens_per_step": round(
                sum(lap.num_tokens for lap in self.laps) / sum(lap.num_steps for lap in self.laps), 3
            ),
            "draft_tokens": sum(lap.total("draft_tokens") for lap in self.laps),
            "accepted_tokens": sum(lap.total("accepted_tokens") for lap in self.laps),
            "answers_with_a_pause": sum(bool(result.stats["paused"]) for lap in self.laps for result in lap.results),
            "tokens_per_second": summary(speeds),
            "speed": ratio(speeds, firsts),
            "ttft_ms": summary([lap.ttft_ms for lap in self.laps]),
            "identical": self.token_ids == first.token_ids,
            "identical_answers": sum(a == b for a, b in pairs),
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
    advance: Advance,
) -> list[PlanRow]:
    """Answer every prompt under every plan: once to warm up, then `repeats` times."""
    laps = Turns(engine, plans, prompts, sampling, repeats, advance).run()
    total = (repeats + 1) * len(prompts) * len(plans)
    advance(total, total)
    return [PlanRow(label, plan, laps[label]) for label, plan in plans.items()]
