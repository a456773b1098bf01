"""Frames of an unfinished answer: a frame holds the changes, and all frames together the whole answer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pitlane import Finished, PrefillProgress, Result, Stream, TextDelta
from pitlane.storage.types import Document, Page
from pitlane.ui.answering import READ_SECONDS, _followed
from pitlane.ui.live_frames import MAX_TABS, LiveFrames, changed, common_start
from pitlane.ui.live_text import LiveText
from pitlane.ui.markup import markdown_html
from pitlane.ui.panels import Live

TEXT = """# Title

Some **bold** words and `code`, on
two lines.

- first

  still the first
- second
1. another list

| a | b |
|---|---|
| 1 | 2 |

```python
x = 1

def f(): pass
```

A formula $a^2$ and \\[ b \\].

> quoted
lazily

heading
---

The end \U0001f600.
"""


def received(blocks: list[str], frame: dict[str, Any]) -> list[str]:
    """Blocks after a frame, as page.js makes them. Its strings are UTF-16."""
    new = list(frame["blocks"])
    if frame["cut"]:
        kept = blocks[frame["keep"]].encode("utf-16-le")[: 2 * frame["cut"]].decode("utf-16-le")
        new[0] = kept + new[0]
    return blocks[: frame["keep"]] + new


@pytest.mark.parametrize("text", [TEXT, f"<think>so\n\nthen `x`</think>\n\n{TEXT}", TEXT.replace("\n", "\r\n"), "word"])
def test_the_blocks_of_a_growing_text_are_those_of_the_whole(text: str) -> None:
    for seed in range(4):
        pieces, live, length, blocks = random.Random(seed), LiveText(), 0, list[str]()
        while length < len(text):
            length = min(len(text), length + pieces.randint(1, 12))
            after = live.blocks(text[:length])
            blocks = received(blocks, changed(blocks, after))
            assert blocks == after
        whole = markdown_html(text).replace("\r", "")
        end = markdown_html(text, is_live=True).replace("\r", "")  # the last block may be code without colours
        assert "".join(blocks).replace("\r", "") in (whole, end)


def test_a_settled_block_is_rendered_once_and_no_other_block_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []

    def counted(text: str, documents: Any) -> Any:
        rendered.append(text)
        return original(text, documents)

    from pitlane.ui import live_text

    original = live_text.blocks_html
    monkeypatch.setattr(live_text, "blocks_html", counted)
    text, live = "A paragraph of some words.\n\n" * 50, LiveText()
    for length in range(0, len(text) + 1, 4):
        live.blocks(text[:length])
        live.blocks(text[:length])  # another tab
    assert max(map(len, rendered)) < 80 and len(rendered) <= len(text) / 4 + 1
    assert len(live.blocks(text)) == 50


def test_reasoning_is_folded_while_it_grows() -> None:
    live = LiveText()
    (block,) = live.blocks("<think>one\n\ntw")
    assert "Reasoning…" in block and "<p>one</p>" in block and block.endswith("</details>")
    first, last = live.blocks("<think>one\n\ntwo</think>The answer")
    assert "Reasoning</summary>" in first and "two" in first and last.strip() == "<p>The answer</p>"


def test_citations_of_an_unfinished_answer_are_checked() -> None:
    document = Document("a.txt", "text/plain", (Page(0, "1", "It opens at 9:40."),), "0" * 64)
    blocks = LiveText([document]).blocks("It opens at 9:40 [p. 1].\n\nIt closes at 5 [p. 1].\n\nand")
    assert "cite found" in blocks[0] and "cite unfound" in blocks[1]


def live(text: str) -> Live:
    return Live(total=10, text=text, num_tokens=len(text))


def test_a_frame_holds_only_what_is_new() -> None:
    frames, start = LiveFrames(()), "One.\n\nTwo"
    whole = frames.next(live(start), "tab", 0)
    assert whole["keep"] == 0 and len(whole["blocks"]) == 2 and "<b>9</b> tokens" in whole["facts"]
    assert frames.next(live(start), "tab", 1) == {"number": 1}, "nothing is new"
    grown = frames.next(live(start + " and three."), "tab", 1)
    assert grown["number"] == 2 and grown["keep"] == 1 and grown["cut"] == len("<p>Two")
    assert grown["blocks"] == [" and three.</p>\n"]


def test_the_reader_of_an_answer_wakes_per_frame_not_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the reader sleeps, no token wakes its thread, and the engine keeps the interpreter."""
    stream, answer, pauses = Stream(lambda: None), Live(), list[float]()

    def write(seconds: float) -> None:  # the engine writes 20 tokens while the reader sleeps
        pauses.append(seconds)
        for token in range(20):
            stream.put(TextDelta("a", (token,)))
        if len(pauses) == 3:
            stream.put(Finished(Result("", [], "stop", {})))

    monkeypatch.setattr("pitlane.ui.answering.time.sleep", write)
    stream.put(PrefillProgress(1, 2, 0))
    stream.put(TextDelta("a", (0,)))
    assert [state.num_tokens for state in _followed(stream, answer)] == list(range(62))
    assert pauses == [READ_SECONDS] * 3 and answer.text == "a" * 61


def test_the_common_start_of_two_texts() -> None:
    for first, second, start in (
        ("", "", ""),
        ("a", "", ""),
        ("ab", "ab", "ab"),
        ("abc", "abd", "ab"),
        ("abcd", "ab", "ab"),
    ):
        assert common_start(first, second) == common_start(second, first) == start


def test_a_token_without_text_is_counted() -> None:
    frames = LiveFrames(())
    frames.next(Live(total=10, text="One", num_tokens=1), "tab", 0)
    counted = frames.next(Live(total=10, text="One", num_tokens=2), "tab", 1)
    assert counted["keep"] == 1 and counted["blocks"] == [] and "<b>2</b> tokens" in counted["facts"]


def test_a_tab_that_lost_a_frame_and_a_new_tab_get_the_whole_answer() -> None:
    frames = LiveFrames(())
    frames.next(live("One.\n\nTwo"), "tab", 0)
    for tab, number in (("tab", 0), ("tab", 7), ("new", 0), ("new", 3)):
        whole = frames.next(live("One.\n\nTwo"), tab, number)
        assert whole["keep"] == whole["cut"] == 0 and len(whole["blocks"]) == 2, (tab, number)


def test_a_tab_that_asks_again_draws_the_answer_that_got_lost() -> None:
    """page.js draws a frame only if its number differs from the number that the tab has."""
    frames = LiveFrames(())
    frames.next(live("One."), "tab", 0)
    frames.next(live("One.\n\nTwo"), "tab", 1)  # this response is lost
    again = frames.next(live("One.\n\nTwo"), "tab", 1)
    assert again["number"] != 1 and again["keep"] == again["cut"] == 0 and len(again["blocks"]) == 2


def test_tabs_beyond_the_limit_are_forgotten() -> None:
    frames = LiveFrames(())
    for tab in range(3 * MAX_TABS):
        frames.next(live("One"), str(tab), 0)
    assert len(frames._sent) == MAX_TABS


def test_progress_comes_before_the_text() -> None:
    frames = LiveFrames(())
    reading = frames.next(Live(done=3, total=10), "tab", 0)
    assert "30 %" in reading["progress"] and reading["blocks"] == []
    assert frames.next(Live(done=3, total=10), "tab", 1) == {"number": 1}
    written = frames.next(live("One"), "tab", 1)
    assert written["progress"] == "" and written["blocks"] == ["<p>One</p>\n"]
