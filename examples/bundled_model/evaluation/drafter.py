"""The value of a drafter: accepted draft tokens per step along the target's greedy output.

Greedy speculative decoding accepts draft tokens as long as they equal the target's tokens. So, up to the first rejected token, the
drafter has read only tokens of the target. One forward of the drafter over prompt and output, [rows, tokens], therefore gives
every acceptance exactly: the number of agreeing tokens in a row, at most K. Sampling and speed are not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence

from bundled_model.evaluation.answering import Answerer
from bundled_model.evaluation.measures import Row

NUM_DRAFT_TOKENS = 4


def accepted_at(agreed: Sequence[bool], position: int, num_draft_tokens: int) -> int:
    """Return the number of accepted tokens of a draft at `position` of an output, at most `num_draft_tokens`."""
    drafted = agreed[position : position + num_draft_tokens]
    return next((count for count, same in enumerate(drafted) if not same), len(drafted))


def accepted_per_step(agreed: Sequence[bool], num_draft_tokens: int) -> list[int]:
    """Return the accepted tokens of each step of one output.

    The prefill gives token 0. A step drafts K tokens and goes forward by the accepted tokens and a token of the target. The last
    steps, with fewer than K tokens left, are not counted: draft tokens after the end token cannot be judged.
    """
    accepted = []
    position = 1
    while position + num_draft_tokens <= len(agreed):
        accepted.append(accepted_at(agreed, position, num_draft_tokens))
        position += accepted[-1] + 1
    return accepted


def acceptance(agreed: Sequence[Sequence[bool]], num_draft_tokens: int) -> Row:
    """Return the mean of accepted tokens over the steps and over all positions, and the share of agreeing tokens."""
    steps = [count for row in agreed for count in accepted_per_step(row, num_draft_tokens)]
    everywhere = [
        accepted_at(row, position, num_draft_tokens)
        for row in agreed
        for position in range(1, len(row) - num_draft_tokens + 1)
    ]
    tokens = [same for row in agreed for same in row[1:]]
    return {
        "outputs": len(agreed),
        "steps": len(steps),
        "accepted": sum(steps) / max(len(steps), 1),
        "accepted_everywhere": sum(everywhere) / max(len(everywhere), 1),
        "agreement": sum(tokens) / max(len(tokens), 1),
    }


def measure(
    target: Answerer,
    drafter: Answerer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
) -> Row:
    """Let the target continue the prompts greedily, and count the tokens that the drafter predicts right."""
    outputs = target.generate(prompts, max_new_tokens)
    choices = drafter.choices(prompts, outputs)
    agreed = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(outputs, choices, strict=True)]
    return acceptance(agreed, num_draft_tokens)
