"""What steps take: running estimates that the governor, the scheduler and the stats reckon with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORGET = 0.2  # weight of the latest step in the estimate of its size
RECENT = 64  # steps; what a size took before them says nothing of smaller sizes now


@dataclass(slots=True)
class StepClock:
    """Seconds of a forward by its number of tokens, per prompt token, and of what a step does besides its forward."""

    by_tokens: dict[int, float] = field(default_factory=dict)
    prompt_rates: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    overheads: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _decoded: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))  # sizes of steps without prompts
    _curve: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None

    def record(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in a forward of `num_tokens`, `num_prompt_tokens` of which were prompt."""
        before = self.by_tokens.get(num_tokens, seconds)
        self.by_tokens[num_tokens] = (1 - FORGET) * before + FORGET * seconds
        self._curve = None
        if num_prompt_tokens == 0:
            self._decoded.append(num_tokens)
        if num_prompt_tokens >= 32:
            self.prompt_rates.append(seconds / num_tokens)

    def record_overhead(self, seconds: float) -> None:
        """Take in what a step without drafts took besides its forward."""
        self.overheads.append(seconds)

    @property
    def overhead(self) -> float:
        """Seconds per step, whatever its number of tokens; the median of the last ones."""
        return median(self.overheads) if self.overheads else 0.0

    @property
    def per_prompt_token(self) -> float | None:
        """Seconds, the median of the last steps with prompts: the first step of a process is slow."""
        return median(self.prompt_rates) if self.prompt_rates else None

    def estimate(self, num_tokens: int) -> float | None:
        """Seconds of a forward over `num_tokens`; None before any was seen."""
        return float(self.estimates([num_tokens])[0]) if self.by_tokens else None

    def estimates(self, sizes: ArrayLike) -> NDArray[np.float64]:
        """Seconds of forwards over so many tokens: between the sizes that were seen, or beyond them by the prompt rate.

        No size is held to take longer than a larger one did of late, so one slow moment does not condemn a size for good.
        Prompts do not count for that: they see less KV and want fewer logits.
        """
        if self._curve is None:
            numbers = np.array(sorted(self.by_tokens))
            seconds = np.array([self.by_tokens[number] for number in numbers.tolist()])
            ceilings = np.where(np.isin(numbers, self._decoded), seconds, np.inf)
            self._curve = numbers, np.minimum(seconds, np.minimum.accumulate(ceilings[::-1])[::-1])
        numbers, seconds = self._curve
        wanted = np.asarray(sizes)
        slope = min(self.per_prompt_token or 0.0, float(seconds[-1]))
        found: NDArray[np.float64] = np.interp(wanted, numbers, seconds) + np.maximum(0, wanted - numbers[-1]) * slope
        return found
