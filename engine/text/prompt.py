"""The parts of a rendered prompt that are documents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens `[start, end)` are the text of a document."""

    start: int
    end: int
    document_hash: str
    title: str
