"""The limits that a drafter gets with the sequences. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pitlane.engine.run.lane import Lane


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tokens a drafter may propose for each sequence, and the lane that opens draft models."""

    num_draft_tokens: list[int]
    lane: Lane
