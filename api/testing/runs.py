"""The requests of a check, and the answers of an engine to them, with a plugin and without it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.engine import Engine
from pitlane.engine.events import Result
from pitlane.engine.plan.plan import Plan

EXACT = "float64"  # in this dtype, rounding changes no token
DRAFT_LENGTH = 16  # tokens of a draft in a check
NUM_PROMPTS = 4
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.5},
)

PromptAndParams = tuple[list[int], SamplingParams]


def prompts(vocab_size: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Prompts of at least 20 tokens. Every second prompt repeats a passage, for drafters and caches."""
    result = []
    for seed in range(count):
        generator = random.Random(seed)
        tokens = [generator.randrange(min(256, vocab_size)) for _ in range(20 + 7 * seed)]
        result.append(tokens * 3 if seed % 2 else tokens)
    return result


def requests_of(vocab_size: int, num_tokens: int) -> list[PromptAndParams]:
    """Every prompt with every sampling. The longest prompt comes last."""
    return [
        (tokens, SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed, **sampling))
        for seed, tokens in enumerate(prompts(vocab_size))
        for sampling in SAMPLINGS
    ]


@dataclass(slots=True)
class Run:
    """An engine, its plans without the plugin (`core`) and with it (`plan`), and their answers to the requests.

    plain: answers of `core`. answers: answers of `plan`. again: answers of `plan` with warm caches, at most 64 tokens per answer.
    """

    engine: Engine
    core: Plan
    plan: Plan
    dtype: str
    num_tokens: int
    requests: list[PromptAndParams] = field(init=False)
    plain: list[Result] = field(init=False)
    answers: list[Result] = field(init=False)
    again: list[Result] = field(init=False)

    def __post_init__(self) -> None:
        self.requests = requests_of(self.engine.loader.vocab_size, self.num_tokens)

    @property
    def is_exact(self) -> bool:
        return self.dtype == EXACT

    @property
    def longest(self) -> list[PromptAndParams]:
        """The requests with the longest prompt: greedy, sampled, and with a penalty."""
        return self.requests[-len(SAMPLINGS) :]

    def answer_all(self) -> None:
        self.plain = answer(self.engine, self.core, self.requests)
        self.answers = answer(self.engine, self.plan, self.requests)
        self.again = answer(self.engine, self.plan, self.requests, min(self.num_tokens, 64))


def answer(engine: Engine, plan: Plan, requests: list[PromptAndParams], num_tokens: int | None = None) -> list[Result]:
    """The answers of requests in one batch. A drafter drafts in every step, even if a draft costs more than it saves."""
    with always_drafting(engine, plan):
        streams = [
            engine.submit(tokens, replace(params, max_tokens=num_tokens or params.max_tokens), plan=plan)
            for tokens, params in requests
        ]
        return [stream.result() for stream in streams]


@contextmanager
def always_drafting(engine: Engine, plan: Plan) -> Iterator[None]:
    """Let the governor of the plan's lane ask for `DRAFT_LENGTH` tokens in every step."""
    governor = engine.lane_of(plan).pacing.governor
    governor.fixed = DRAFT_LENGTH
    try:
        yield
    finally:
        governor.fixed = None
