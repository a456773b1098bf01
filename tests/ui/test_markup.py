"""Quotations and figures of an answer are found on the cited page however either side spells them."""

from __future__ import annotations

import re

import pytest

from pitlane.storage.types import Document, Page
from pitlane.ui.markup import citation_html, folded, markdown_html

KINDS = {"found": 'class="cite found"', "unfound": 'class="cite unfound"', "neutral": 'class="cite" '}


def document(text: str) -> Document:
    return Document("T", "text/plain", (Page(0, "1", text),), "hash")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("It’s the driver’s choice.", "\"it's the driver's choice\""),
        ("It's the driver's choice.", "“It’s the driver’s choice”"),
        ("he said “go now” twice", "\"he said 'go now' twice\""),
        ("``go there'' he said", '"“go there” he said"'),
        ("pages 3–5 of it", '"pages 3-5 of it"'),
        ("always \u2014 or never", '"always-or never"'),
        ("a well\u2011known fact", '"a well-known fact"'),
        ("The café is open", '"The cafe\u0301 is open"'),
        ("The cafe\u0301 is open", '"the café is open"'),
        ("the ﬁnal ﬂow", '"the final flow"'),
        ("an eﬃcient oﬀer", '"an efficient offer"'),
        ("the final flow", "“the ﬁnal ﬂow”"),
        ("it took 10\u00a0000\u202fkm", '"10 000 km"'),
        ("co\u00adop\u200berate now", '"cooperate now"'),
        ("Straße frei", '"STRASSE FREI"'),
        ("wait… what", '"wait... what"'),
        ("the end is near, he wrote", '"the end is near."'),
        ("a line\nand a line", '"a line and a line"'),
        ("it’s so", "‘it’s so’"),
        ("das sagt er hier", "„sagt er hier“"),
        ("dit-il ici", "«\u00a0dit-il ici\u00a0»"),
        ("ＡＢＣ here", '"ABC here"'),
        ("it cost 1,234 in all", "1,234"),
        ("write <system> first", '"write ‹system> first"'),
    ],
)
def test_spellings_that_are_one(page: str, said: str) -> None:
    assert KINDS["found"] in citation_html(1, said, [document(page)])
    assert KINDS["unfound"] in citation_html(1, said, [document("something else")])


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("about 10² m", "102"),
        ("H₂O and CO₂", '"CO2 and"'),
        ("½ of it", "12"),
        ("3.14", "3"),
        ("cafe noir", '"café noir"'),
        ("no more", '"..."'),
        ("a b", '"\u200b\u200b\u200b"'),
    ],
)
def test_spellings_that_are_not(page: str, said: str) -> None:
    assert KINDS["unfound"] in citation_html(1, said, [document(page)])


def test_a_citation_may_hold_a_space_that_does_not_break() -> None:
    assert KINDS["found"] in markdown_html("“It’s late” [p.\u00a01]", [document("it's late")])


def test_folded_text_is_stable() -> None:
    text = "‘It’s’ — the ﬁnal\u00a0ﬂow…"
    assert folded(text) == folded(folded(text)) == "'it's'-the final flow..."


@pytest.mark.parametrize(
    "text, shown",
    [
        ("1. **Boil the ", "<strong>Boil the</strong>"),
        ("1. Water. **", "<li>Water.</li>"),
        ("a **b** c", "a <strong>b</strong> c"),
        ("```python\nf(**kwargs", "f(**kwargs"),
        ("**a\n\nb **c", "<strong>c</strong>"),
    ],
)
def test_bold_words_are_closed_while_they_are_written(text: str, shown: str) -> None:
    live = markdown_html(text, is_live=True)
    assert shown in re.sub(r"</?span[^>]*>", "", live).replace(' dir="auto"', ""), live
    if text.startswith("1. **"):
        assert "**" not in live and "**" in markdown_html(text), "a finished text stays as it is"
