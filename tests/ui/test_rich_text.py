"""Formulas, code, tables, task lists and text from right to left as HTML."""

from __future__ import annotations

import pytest

from pitlane.ui.markup import markdown_html, plain_html
from pitlane.ui.page_server import katex_path
from pitlane.ui.rich_text import MAX_COLOURED, coloured


@pytest.mark.parametrize(
    ("text", "kind", "tex"),
    [
        ("so $a_1 < b$.", "", "a_1 &lt; b"),
        (r"so \(a + b\) is", "", "a + b"),
        ("$$\n\\sum_i x_i\n$$", "display", r"\sum_i x_i"),
        ("\\[\n\\frac{1}{2}\n\\]", "display", r"\frac{1}{2}"),
        ("$x$", "", "x"),
        ("so $x^2$, too", "", "x^2"),
        ("$5 + x$", "", "5 + x"),
    ],
)
def test_formulas_keep_their_source_for_the_browser(text: str, kind: str, tex: str) -> None:
    assert f'<span class="math {kind}" data-tex="{tex}"><code>{tex}</code></span>' in markdown_html(text)


NO_FORMULAS = ["$5 and $6", "$5-$10 each", "a $ b $ c", r"\$x\$", "`$x$`", "costs 5 $", "$ x $"]
NO_FORMULAS += ["export PATH=$HOME/bin:$PATH", "$b, not `$c`", "`$b`, not $c and `$d`", "$5 (US$)", "US$5, or US$6"]


@pytest.mark.parametrize("text", NO_FORMULAS)
def test_prices_and_code_are_no_formulas(text: str) -> None:
    assert "math" not in markdown_html(text)


def test_a_formula_cannot_leave_its_attribute() -> None:
    html = markdown_html('$"><img src=x onerror=y>$')
    assert "<img" not in html and "&quot;&gt;&lt;img" in html


def test_gradio_brings_the_file_that_draws_formulas() -> None:
    assert katex_path().startswith("./assets/katex-") and katex_path().endswith(".js")


def test_code_is_coloured_and_can_be_copied() -> None:
    html = markdown_html("```python\nif x < 1:\n    pass  # <b>\n```")
    assert '<span class="k">if</span>' in html and "&lt;b&gt;" in html
    assert 'data-source="if x &lt; 1:\n    pass  # &lt;b&gt;"' in html and 'data-do="copy"' in html
    assert "<span>python</span>" in html
    live = markdown_html("```python\nif x < 1:\n", is_live=True)
    assert 'class="k"' not in live and "if x &lt; 1:" in live and "copy" not in live and "data-source" not in live
    assert "copy" not in markdown_html("<think>so\n```python\nif x:\n", is_live=True)
    assert coloured("<x>", "no such language") == "&lt;x&gt;" == coloured("<x>", "")
    assert "span" not in coloured("a = 1\n" * MAX_COLOURED, "python")


def test_tasks_have_boxes_and_other_brackets_have_none() -> None:
    html = markdown_html("- [x] done\n- [ ] open\n- [x](http://e.org) link\n- plain [ ]")
    assert html.count('class="box done"') == 1 and html.count('class="box"') == 1
    assert '<li class="task"><i class="box done" role="img" aria-label="done"></i>done</li>' in html
    assert "plain [ ]" in html


def test_tables_scroll_on_their_own() -> None:
    assert '<div class="wide"><table>' in markdown_html("| a | b |\n|---|---|\n| 1 | 2 |")


def test_blocks_find_their_direction_where_text_runs_from_right_to_left() -> None:
    html = markdown_html("שלום עולם\n\n- hello\n- مرحبا\n\n```\ncode\n```")
    assert html.startswith('<p dir="auto">') and html.count('<li dir="auto">') == 2 and '<pre dir="ltr">' in html
    assert plain_html("שלום") == '<p dir="auto">שלום</p>' and "dir" not in markdown_html("hello")
