"""The page of a document that the model reads at present. The number is an estimate: characters and tokens of a page keep pace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from pitlane.storage.types import Document

if TYPE_CHECKING:
    from pitlane import Segment


def page_read(documents: Sequence[Document], segments: Sequence[Segment], num_computed: int) -> tuple[int, int] | None:
    """Number of the page that holds the last of the computed tokens of a prompt, and the pages of its document.

    segments: of the prompt. None before the first document and behind the last, and for a document of one page.
    """
    by_hash = {document.content_hash: document for document in documents}
    for segment in segments:
        document = by_hash.get(segment.document_hash)
        if document is None or not segment.start < num_computed <= segment.end or len(document.pages) < 2:
            continue
        ends = list(accumulate(len(page.text) for page in document.pages))
        place = (num_computed - segment.start) / (segment.end - segment.start) * ends[-1]
        return min(bisect_left(ends, place) + 1, len(ends)), len(ends)
    return None


def page_text(place: tuple[int, int] | None) -> str:
    """The place in words; empty outside of documents."""
    return "" if place is None else f"page {place[0]:,} of {place[1]:,}"
