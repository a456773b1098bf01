"""The next-token distributions of a plan along a given text, and the distance between two plans.

`Recorder` is a plugin outside every registry. Added to a plan for a request, it makes the model write a given text. So two plans
show their distributions after the same tokens, computed by their own decode steps. Drafters are left out: they change no
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.decode.rows import Rows
from pitlane.engine.engine import Engine
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Recorder(Plugin):
    """Records the distribution before every token of a text, and makes the model write this token."""

    name, exactness, stage = "testing_recorder", "steering", 1 << 20

    def __init__(self, token_ids: Sequence[int]) -> None:
        super().__init__()
        self.token_ids = token_ids
        self.probabilities: list[Tensor] = []  # [V] in float64

    @hookimpl
    def adjust_logits(self, rows: Rows) -> None:
        token = self.token_ids[rows.seqs[0].num_completion_tokens]
        self.probabilities.append(rows.logits[0].double().softmax(-1))
        rows.logits.fill_(float("-inf"))
        rows.logits[0, token] = 0.0


def distributions(engine: Engine, plan: Plan, prompt: Sequence[int], token_ids: Sequence[int]) -> list[Tensor]:
    """Return the distribution [V] before every token of `token_ids`, which follow the prompt."""
    settings = plan.settings
    if plan.drafter is not None:
        del settings[plan.drafter.name]
    base = engine.plan(settings)
    recorder = Recorder(token_ids)
    params = SamplingParams(max_tokens=len(token_ids), ignore_eos=True)
    engine.generate(list(prompt), params, plan=engine.planner.extended(base, recorder))
    return recorder.probabilities


def moved(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean share of the next token's probability that differs: half the sum of the absolute differences."""
    shares = [float((a - b).abs().sum()) / 2 for a, b in zip(reference, other, strict=True)]
    return sum(shares) / len(shares)
