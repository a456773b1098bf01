"""How many prompt tokens a step may hold beside running streams: a time, not a number.

A step that also reads a prompt delays every stream by the whole step, so it may take `SLOWDOWN` times what the step would take
without the prompt (Sarathi-Serve, 2403.02310, bounds it by tokens instead). How many tokens that is depends on the machine, the
model and the length of the context; it is found by trying: each full step moves the number by the ratio of the time it
should have taken to the time it took, which settles because a step's time never grows faster than its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOWDOWN = 1.9  # of a step with a prompt; leaves room for noise below 2.5 at the 95th percentile
MIN_TOKENS = 8  # so much of a prompt is read in any step, however long the step
LOWEST, HIGHEST = 0.7, 1.25  # one step moves the number by no more


@dataclass(slots=True)
class StepBudget:
    """Prompt tokens per step while somebody reads along."""

    size: float = 4.0 * MIN_TOKENS
    target: float | None = None  # seconds of the step under way

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that a step may hold."""
        return int(self.size)

    def aim(self, plain_seconds: float | None) -> None:
        """Begin with a step that takes so long without a prompt; None: as long as it likes, and nothing is learnt from it."""
        self.target = None if plain_seconds is None else SLOWDOWN * plain_seconds

    def took(self, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step; one that held less than it might have says nothing."""
        if self.target is not None and num_prompt_tokens >= self.num_tokens:
            ratio = min(HIGHEST, max(LOWEST, self.target / seconds))
            self.size = max(float(MIN_TOKENS), self.size * ratio)
