"""Times of steps: running estimates for the governor, the scheduler and the stats.

Comments at constants say what tests/engine/pacing/ablation.py measures when a constant changes.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median

NEW_WEIGHT = 0.2  # of the latest forward in the estimate of its size; 0.1: 1 %, off (1.0): 0.6 % slower
RECENT = 64  # decode steps; a size that is not in them bounds no smaller size; 16 or off: within 0.4 %
MAX_JUMP = 2.0  # times its estimate that a forward counts for at most; off: 5 % slower where steps are slow at times


@dataclass(slots=True)
class StepClock:
    """Seconds of a forward by its number of tokens, of a prompt token, and of a step besides its forward.

    by_tokens: the estimate of each measured size, after its last forward. pace: how much slower the machine has become, measured
    by recent decode steps. An estimate is scaled by the change of the pace since the last forward of its size.
    """

    by_tokens: dict[int, float] = field(default_factory=dict)
    pace: float = 1.0
    prompt_rates: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    overheads: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _sizes: list[int] = field(default_factory=list)  # of `by_tokens`, sorted
    _recent: deque[int] = field(default_factory=deque)  # sizes of the last steps without prompts
    _counts: Counter[int] = field(default_factory=Counter)  # of `_recent`
    _paces: dict[int, float] = field(default_factory=dict)  # the pace at the last forward of each size
    _cache: dict[float, float] = field(default_factory=dict)  # estimates since the last step

    def __post_init__(self) -> None:
        self._sizes = sorted(self.by_tokens)

    def record(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a forward over `num_tokens`, `num_prompt_tokens` of which were prompt."""
        if num_tokens not in self.by_tokens:
            insort(self._sizes, num_tokens)
            self.by_tokens[num_tokens] = seconds
        before = self.measured(num_tokens)
        seconds_held = min(seconds, MAX_JUMP * before)
        self.by_tokens[num_tokens] = now = (1 - NEW_WEIGHT) * before + NEW_WEIGHT * seconds_held
        self._cache.clear()
        if num_prompt_tokens == 0:
            self.pace *= (now / before) ** (self._counts[num_tokens] / max(1, len(self._recent)))
            self._count(num_tokens)
        self._paces[num_tokens] = self.pace
        if num_prompt_tokens >= 32:
            self.prompt_rates.append(seconds / num_tokens)

    def _count(self, num_tokens: int) -> None:
        self._recent.append(num_tokens)
        self._counts[num_tokens] += 1
        if len(self._recent) > RECENT:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def measured(self, num_tokens: int) -> float:
        """Seconds that a measured size would take at the pace of now."""
        return self.by_tokens[num_tokens] * self.pace / self._paces.get(num_tokens, self.pace)

    def record_overhead(self, seconds: float) -> None:
        """Learn how long a step without drafts took besides its forward."""
        self.overheads.append(seconds)

    @property
    def overhead(self) -> float:
        """Seconds of a step besides its forward, the median of recent steps."""
        return median(self.overheads) if self.overheads else 0.0

    @property
    def per_prompt_token(self) -> float | None:
        """Seconds, the median of recent steps with prompts: the first step of a process is slow."""
        return median(self.prompt_rates) if self.prompt_rates else None

    def estimate(self, num_tokens: int) -> float | None:
        """Seconds of a forward over `num_tokens`; None before the first forward."""
        return self._estimate(num_tokens) if self.by_tokens else None

    def estimates(self, sizes: Iterable[float]) -> list[float]:
        """Seconds of forwards over such numbers of tokens: a line between measured sizes, the prompt rate beyond them.

        No size takes longer than a larger size took in a recent decode step, so one slow moment does not condemn a size for good.
        Steps with prompts do not count for that: their tokens see less KV and want fewer logits.
        """
        return [self._estimate(size) for size in sizes]

    def _estimate(self, size: float) -> float:
        if size in self._cache:
            return self._cache[size]
        if size in self.by_tokens:
            seconds = min(self.measured(int(size)), self._ceiling(size))
        else:
            index = bisect(self._sizes, size)
            low, high = self._sizes[max(0, index - 1)], self._sizes[min(index, len(self._sizes) - 1)]
            seconds = self._estimate(low)
            if size > high:
                seconds += (size - high) * min(self.per_prompt_token or 0.0, seconds)
            elif size > low:
                seconds += (size - low) / (high - low) * (self._estimate(high) - seconds)
        self._cache[size] = seconds
        return seconds

    def _ceiling(self, size: float) -> float:
        """The shortest time of this size and the larger sizes in recent decode steps."""
        return min((self.measured(number) for number in self._counts if number >= size), default=inf)
