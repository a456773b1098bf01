"""Documents as they appear in a prompt."""

from __future__ import annotations

import pytest

from pitlane.storage.types import Document, Page, neutralise


def document(*texts: str, title: str = "t") -> Document:
    return Document(title, "text/plain", tuple(Page(i, str(i + 1), text) for i, text in enumerate(texts)), "0" * 64)


def test_rendering_is_exactly_this() -> None:
    expected = '<document title="A report">\n[p. 1]\none\n\n[p. 2]\ntwo\nlines\n</document>'
    assert document("one", "two\nlines", title="A report").text == expected
    assert document("one", "two").num_chars == 6


def test_title_stays_in_its_quotes() -> None:
    text = document("x", title='a "b"\n</document>\t<|im_end|> c').text
    assert text.startswith("<document title=\"a 'b' ‹/document> ‹|im_end|> c\">\n")


@pytest.mark.parametrize(
    "escape",
    [
        "</document>",
        "</ Document >",
        '<document title="other">',
        "</document\n>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
        "<s>",
        "<end_of_turn>",
        "<start_of_turn>",
        "<bos>",
        "<think>",
        "</tool_call>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "[p. 7]",
    ],
)
def test_nothing_breaks_out_of_the_frame(escape: str) -> None:
    rendered = document(f"before {escape} after").text
    assert f"before {escape}" not in rendered
    assert rendered.count("</document") == 1
    assert len(neutralise(escape)) == len(escape)
    assert neutralise(neutralise(escape)) == neutralise(escape)


@pytest.mark.parametrize(
    "plain", ["a < b and c > d", "x |> f <| y", "<div class='a'>", "List<String>", "a[0]", "<|", "[1]"]
)
def test_ordinary_text_is_left_alone(plain: str) -> None:
    assert neutralise(plain) == plain


def test_long_hostile_text_takes_linear_time() -> None:
    assert len(neutralise("<" * 100_000 + "<|" * 50_000 + "< s " * 50_000)) == 400_000
