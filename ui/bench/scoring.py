"""Distributions of two plans over the same text: KL divergence, perplexity, and how close a choice was.

`Recorder` is a plugin of no registry. It is added to a plan for one request and makes the model write a given answer, token by
token. So every plan is asked for its distribution behind the same tokens, by the forwards that it decodes with. Drafters are left
out: they change no distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import exp
from typing import TYPE_CHECKING

from pitlane import Plugin, Rows, SamplingParams, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pitlane import Plan, Prompt
    from pitlane.ui.bench.turns import Turns

MAX_KEPT_BYTES = 128 * 10**6  # of distributions: 640 tokens at a vocabulary of 49,152
MAX_SCORED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Scores:
    """A plan's distributions over the first plan's answer, compared with the distributions of the first plan.

    kl, kl_max: mean and maximum over the tokens of KL(first plan || this plan), in nats. top1: share of tokens where both plans
    have the same likeliest token. perplexity: of the first plan's answer under this plan.
    """

    num_tokens: int
    perplexity: float
    kl: float = 0.0
    kl_max: float = 0.0
    top1: float = 1.0


@dataclass(slots=True)
class Reading:
    """What the recorder saw. kept: log-probabilities [V] behind every token, only for the first plan."""

    logprob: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def scores(self) -> Scores | None:
        """None if nothing was recorded."""
        count = len(self.logprob)
        if not count:
            return None
        perplexity = exp(min(700.0, -sum(self.logprob) / count))
        if not self.kl:
            return Scores(count, perplexity)
        return Scores(count, perplexity, sum(self.kl) / count, max(self.kl), sum(self.agrees) / count)


class Recorder(Plugin):
    """Records the distribution behind every token of an answer, and makes the model write the answer's next token."""

    name, exactness = "compare_recorder", "steering"
    stage = 1 << 20  # behind all plugins that adjust logits

    def __init__(self, token_ids: Sequence[int], reading: Reading, first: Reading | None) -> None:
        super().__init__()
        self.token_ids, self.reading, self.first = token_ids, reading, first

    @hookimpl
    def adjust_logits(self, rows: Rows) -> None:
        index = rows.seqs[0].num_completion_tokens
        token, reading = self.token_ids[index], self.reading
        logprobs = rows.logits[0].double().log_softmax(-1)
        reading.logprob.append(float(logprobs[token]))
        if self.first is None:
            reading.kept.append(logprobs.float())
        else:
            reference = self.first.kept[index].double()
            differences = (reference - logprobs).nan_to_num(nan=0.0)  # two tokens of probability 0
            reading.kl.append(max(0.0, float((reference.exp() * differences).sum())))
            reading.agrees.append(bool(reference.argmax() == logprobs.argmax()))
        rows.logits.fill_(float("-inf"))
        rows.logits[0, token] = 0.0


def num_scored(num_tokens: int, vocab_size: int) -> int:
    """The number of tokens whose distributions fit into `MAX_KEPT_BYTES`."""
    return min(num_tokens, MAX_SCORED_TOKENS, MAX_KEPT_BYTES // (4 * vocab_size))


def read_along(
    turns: Turns, prompt: Prompt, token_ids: Sequence[int], plan: Plan, first: Reading | None, salt: str
) -> Reading:
    """Let a plan write `token_ids` behind the prompt, and return its distributions. first: the reading of the first plan."""
    engine, reading = turns.engine, Reading()
    settings = plan.settings
    if plan.drafter is not None:
        del settings[plan.drafter.name]
    without_drafts = engine.plan(settings)
    recording = engine.planner.extended(without_drafts, Recorder(token_ids, reading, first))
    sampling = SamplingParams(max_tokens=len(token_ids), ignore_eos=True)
    turns.generate(replace(prompt, segments=()), sampling, recording, salt)
    return reading
