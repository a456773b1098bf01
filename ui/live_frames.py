"""The frames of an unfinished answer: the changes since the last frame that a browser tab drew.

page.js asks for the next frame when it has drawn the last one. So a slow browser gets fewer frames, and no frame waits. A frame
gives the number of blocks to keep, then the changed blocks; of the first changed block, only its end:

    {"number": 7, "progress": "", "keep": 3, "cut": 120, "blocks": [" lighthouse.</p>"], "facts": "..."}

`cut` counts UTF-16 units, as JavaScript does. A tab whose last frame is not the last one sent gets the whole answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pitlane.storage.types import Document
from pitlane.ui.live_text import LiveText
from pitlane.ui.panels import Live, facts_html, progress_html

MAX_TABS = 32  # tabs of an answer that get changes; further tabs get whole answers


class Sent(NamedTuple):
    """The last frame that a tab got."""

    number: int
    blocks: list[str]
    progress: str
    facts: str


@dataclass(slots=True)
class LiveFrames:
    """The frames of an answer for all tabs that show it. Not thread-safe."""

    documents: Sequence[Document]
    _text: LiveText = field(init=False)
    _sent: OrderedDict[str, Sent] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._text = LiveText(self.documents)

    def next(self, live: Live, tab: str, number: int) -> dict[str, Any]:
        """The frame after frame `number` of a tab. The same number comes back if nothing is new."""
        sent = self._sent.pop(tab, None)
        is_whole = sent is None or sent.number != number
        if sent is None or sent.number != number:
            # its next frame has another number than the tab's frame, so the tab draws it
            sent = Sent(number, [], "", "")
        progress = progress_html(live, self.documents)
        blocks = [] if progress else self._text.blocks(live.text)
        facts = "" if progress else facts_html(live)  # a token without text changes them alone
        now = Sent(sent.number + 1, blocks, progress, facts)
        is_new = is_whole or now[1:] != sent[1:]
        now = now if is_new else sent
        self._sent[tab] = now
        if len(self._sent) > MAX_TABS:
            self._sent.popitem(last=False)
        if not is_new:
            return {"number": now.number}
        return {"number": now.number, "progress": progress, "facts": facts, **changed(sent.blocks, blocks)}


def changed(before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """What turns blocks into others: the number to keep, then new blocks, the first without `cut` units that it has already."""
    keep = 0
    while keep < min(len(before), len(after)) and before[keep] == after[keep]:
        keep += 1
    blocks = list(after[keep:])
    if keep == len(before) or not blocks:
        return {"keep": keep, "cut": 0, "blocks": blocks}
    same = common_start(before[keep], blocks[0])
    blocks[0] = blocks[0][len(same) :]
    return {"keep": keep, "cut": len(same.encode("utf-16-le", "surrogatepass")) // 2, "blocks": blocks}


def common_start(first: str, second: str) -> str:
    """The longest text with which both texts begin, by bisection: a comparison of characters in Python took most of a frame."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first.startswith(second[:middle]) else (low, middle - 1)
    return first[:low]
