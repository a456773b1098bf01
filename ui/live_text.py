"""The text of an unfinished answer as HTML, block by block: a block is rendered again only while it can still change.

A block of Markdown (a paragraph, a list, a code block) is settled when the first line of the next block is complete. A settled
block is rendered once, with colours and a button if it is code. The blocks behind it are rendered whenever the text has grown.
Two details are right in the finished answer only: a link whose definition follows in a later block, and the direction of blocks
without a letter from right to left. Knows no Gradio and no browser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pitlane.storage.types import Document
from pitlane.ui.markup import blocks_html, thought_html

_THINK, _THOUGHT_END = re.compile(r"\s*<think>"), "</think>"
_LINE_END = re.compile(r"\r\n?|\n")


class LiveText:
    """Renders a text that only grows. documents: the sources of citations."""

    def __init__(self, documents: Sequence[Document] = ()) -> None:
        self._documents = documents
        self._settled: list[str] = []
        self._start = 0  # where the block that can change begins
        self._thought: LiveText | None = None  # reasoning without its end yet
        self._text, self._blocks = "", list[str]()

    def blocks(self, text: str) -> list[str]:
        """The HTML of every block of the text. All blocks but the last two keep their HTML when the text grows."""
        if text != self._text:
            self._text, self._blocks = text, self._render(text)
        return self._blocks

    def _render(self, text: str) -> list[str]:
        if not self._settled and (think := _THINK.match(text)):
            end = text.find(_THOUGHT_END, think.end())
            self._thought = self._thought or LiveText()
            reasoning = "".join(self._thought.blocks(text[think.end() : end if end >= 0 else None]))
            if end < 0:
                return [thought_html(reasoning, is_live=True)]
            self._settled, self._start = [thought_html(reasoning)], end + len(_THOUGHT_END)
        rest = text[self._start :]
        blocks = blocks_html(rest, self._documents)
        shown = [*self._settled, *blocks.html]
        self._settled += blocks.html[: blocks.num_settled]
        ends = [match.end() for match in _LINE_END.finditer(rest)]
        self._start += ends[blocks.line - 1] if blocks.line else 0
        return shown
