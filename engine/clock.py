"""What steps take: running estimates that the governor and the stats reckon with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median


@dataclass(slots=True)
class StepClock:
    """Running estimates: seconds of a forward by its number of tokens, per prompt token, and of drafting a token."""

    by_tokens: dict[int, float] = field(default_factory=dict)
    prompt_rates: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    draft_rates: dict[str, deque[float]] = field(default_factory=dict)  # by drafter

    def record(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in a forward of `num_tokens`, `num_prompt_tokens` of which were prompt."""
        self.by_tokens[num_tokens] = 0.8 * self.by_tokens.get(num_tokens, seconds) + 0.2 * seconds
        if num_prompt_tokens >= 32:
            self.prompt_rates.append(seconds / num_tokens)

    def record_draft(self, drafter: str, num_tokens: int, seconds: float) -> None:
        """Take in what drafting `num_tokens` took."""
        if num_tokens:
            self.draft_rates.setdefault(drafter, deque(maxlen=9)).append(seconds / num_tokens)

    def per_draft_token(self, drafter: str) -> float:
        """Seconds, the median of its last drafts, 0 before any: a draft model's first one takes in the whole prompt."""
        rates = self.draft_rates.get(drafter)
        return median(rates) if rates else 0.0

    @property
    def per_prompt_token(self) -> float | None:
        """Seconds, the median of the last steps with prompts: the first step of a process is slow."""
        return median(self.prompt_rates) if self.prompt_rates else None

    def estimate(self, num_tokens: int) -> float | None:
        """Seconds of a forward over `num_tokens`, between the sizes that were seen; None before any was."""
        if num_tokens in self.by_tokens:
            return self.by_tokens[num_tokens]
        below = max((n for n in self.by_tokens if n < num_tokens), default=None)
        above = min((n for n in self.by_tokens if n > num_tokens), default=None)
        if below is None:
            return None if above is None else self.by_tokens[above]
        low = self.by_tokens[below]
        if above is not None:
            high = max(low, self.by_tokens[above])
            return low + (high - low) * (num_tokens - below) / (above - below)
        return low + (num_tokens - below) * min(self.per_prompt_token or 0.0, low)
