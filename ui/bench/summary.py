"""Medians with their spread, and ratios of paired measurements with an interval. Plain numbers, no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any

_RESAMPLES = 2000
MIN_COMPARED_TOKENS = 32  # the speed of a shorter answer varies by chance


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum, maximum and count."""
    return {
        "median": round(median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ratio of medians ours / theirs, with a 95 % bootstrap interval over the pairs.

    Pair i is block i of each side, measured in turn (A B A B).
    """
    assert len(ours) == len(theirs), "pairs are measured in turn"
    generator, pairs = random.Random(0), list(zip(ours, theirs, strict=True))
    resampled = sorted(_ratio(generator.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    edge = _RESAMPLES // 40
    return {
        "ratio": round(_ratio(pairs), 4),
        "low": round(resampled[edge], 4),
        "high": round(resampled[-edge - 1], 4),
        "pairs": len(pairs),
    }


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median and range of the ratios ours / theirs of all pairs. Pair i is lap i of both sides, measured in turn (A B A B)."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ratio": round(median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "pairs": len(ratios),
    }


def show(values: dict[str, Any], digits: int = 1) -> str:
    """`101.2 (99.8 to 104.0)`."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return median(a for a, _ in pairs) / median(b for _, b in pairs)
