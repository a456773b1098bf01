"""How many prompt tokens a step may hold beside running streams: a time, not a number.

A step that also reads a prompt delays every stream by the whole step. It may take `SLOWDOWN` times as long as a step without the
prompt (Sarathi-Serve, 2403.02310, bounds the tokens instead). How many tokens that is depends on the machine, the model and the
length of the context, so each full step scales the number by the ratio of the wanted time to the measured time. That settles,
because the time of a step never grows faster than its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOWDOWN = 1.9  # leaves room for noise below 2.5 at the 95th percentile; 1.4: 10 % slower in all while prompts are read
MIN_TOKENS = 8  # of a prompt in any step: a prompt is never starved
LOWEST, HIGHEST = 0.7, 1.25  # bounds of the ratio of one step; off: 2 % slower where steps are slow at times


@dataclass(slots=True)
class StepBudget:
    """Prompt tokens per step while a reader waits for a stream."""

    size: float = 4.0 * MIN_TOKENS
    target: float | None = None  # seconds of the step under way

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that a step may hold."""
        return int(self.size)

    def aim(self, plain_seconds: float | None) -> None:
        """Begin with a step that takes `plain_seconds` without a prompt. None: the step has no limit and teaches nothing."""
        self.target = None if plain_seconds is None else SLOWDOWN * plain_seconds

    def took(self, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step; a step that held fewer prompt tokens than it might teaches nothing."""
        if self.target is not None and num_prompt_tokens >= self.num_tokens:
            ratio = min(HIGHEST, max(LOWEST, self.target / seconds))
            self.size = max(float(MIN_TOKENS), self.size * ratio)
