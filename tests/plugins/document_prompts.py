"""Prompts on documents of random tokens, for tests of saved KV."""

from __future__ import annotations

import random

from pitlane import Segment
from pitlane.engine.text.tokenizer import Prompt


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def chat(*documents: tuple[int, int], question: int = 99, num_question_tokens: int = 12) -> Prompt:
    """A question on documents given as (seed, length)."""
    token_ids: list[int] = []
    segments = []
    for seed, length in documents:
        segments.append(Segment(len(token_ids), len(token_ids) + length, f"{seed:064x}", f"{seed}.pdf"))
        token_ids += tokens(seed, length)
    return Prompt(token_ids + tokens(question, num_question_tokens), tuple(segments), "")
