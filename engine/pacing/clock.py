"""What steps take: running estimates that the governor, the scheduler and the stats reckon with."""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median

FORGET = 0.2  # weight of the latest step in the estimate of its size
MOST_CHANGE = 2.0  # times that a size which is not seen is held to have become slower, or faster
RECENT = 64  # steps; what a size took before them says nothing of smaller sizes now


@dataclass(slots=True)
class StepClock:
    """Seconds of a forward by its number of tokens, per prompt token, and of what a step does besides its forward.

    by_tokens: as each was seen last. pace: how much slower the machine has become, told by the sizes that are seen; the others are
    held to have become slower by as much since they were seen.
    """

    by_tokens: dict[int, float] = field(default_factory=dict)
    pace: float = 1.0
    prompt_rates: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    overheads: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _sizes: list[int] = field(default_factory=list)  # of `by_tokens`, sorted
    _decoded: deque[int] = field(default_factory=deque)  # sizes of the last steps without prompts
    _counts: Counter[int] = field(default_factory=Counter)  # of `_decoded`
    _paces: dict[int, float] = field(default_factory=dict)  # when each size was seen last
    _known: dict[float, float] = field(default_factory=dict)  # estimates since the last step

    def __post_init__(self) -> None:
        self._sizes = sorted(self.by_tokens)

    def record(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in a forward of `num_tokens`, `num_prompt_tokens` of which were prompt."""
        if num_tokens not in self.by_tokens:
            insort(self._sizes, num_tokens)
            self.by_tokens[num_tokens] = seconds
        before = self.seen(num_tokens)
        self.by_tokens[num_tokens] = now = (1 - FORGET) * before + FORGET * seconds
        self._known.clear()
        if num_prompt_tokens == 0:
            self.pace *= (now / before) ** (self._counts[num_tokens] / max(1, len(self._decoded)))
            self._decoded.append(num_tokens)
            self._counts[num_tokens] += 1
            if len(self._decoded) > RECENT:
                oldest = self._decoded.popleft()
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]
        self._paces[num_tokens] = self.pace
        if num_prompt_tokens >= 32:
            self.prompt_rates.append(seconds / num_tokens)

    def seen(self, num_tokens: int) -> float:
        """Seconds that a size which was seen would take now."""
        change = self.pace / self._paces.get(num_tokens, self.pace)
        return self.by_tokens[num_tokens] * min(MOST_CHANGE, max(1 / MOST_CHANGE, change))

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
        return self._at(num_tokens) if self.by_tokens else None

    def estimates(self, sizes: Iterable[float]) -> list[float]:
        """Seconds of forwards over so many tokens: between the sizes that were seen, or beyond them by the prompt rate.

        No size is held to take longer than a larger one did of late, so one slow moment does not condemn a size for good.
        Prompts do not count for that: they see less KV and want fewer logits.
        """
        return [self._at(size) for size in sizes]

    def _at(self, size: float) -> float:
        if size in self._known:
            return self._known[size]
        if size in self.by_tokens:
            found = min(self.seen(int(size)), self._ceiling(size))
        else:
            at = bisect(self._sizes, size)
            low, high = self._sizes[max(0, at - 1)], self._sizes[min(at, len(self._sizes) - 1)]
            found = self._at(low)
            if size > high:
                found += (size - high) * min(self.per_prompt_token or 0.0, found)
            elif size > low:
                found += (size - low) / (high - low) * (self._at(high) - found)
        self._known[size] = found
        return found

    def _ceiling(self, size: float) -> float:
        """What the larger sizes, and this one, took of late."""
        return min((self.seen(number) for number in self._counts if number >= size), default=inf)
