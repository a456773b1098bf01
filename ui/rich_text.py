"""Rules of the Markdown renderer for more than prose: formulas, code, tables, task lists, text from right to left.

A formula becomes an element with its TeX source; page.js turns it into MathML with the KaTeX that Gradio serves from this machine.
Without it, the source stays readable. Code is coloured by Pygments and has a button that copies it. All text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

MAX_COLOURED = 20_000  # characters of code; colouring takes about a millisecond per 1,000
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
# Prices, shell variables and code are no formulas: `$5 and $6`, `$5 (US$)`, `$HOME/bin:$PATH`. So a formula in a line has no
# backtick, no blank behind its opening `$`, no blank and no `US` before its closing `$`, and no letter or digit behind it.
_FORMULA = re.compile(
    r"\$\$(?P<b>[^$]+?)\$\$|\\\[(?P<c>.+?)\\\]|\\\((?P<d>.+?)\\\)|\$(?P<a>[^\s$`](?:[^$\n`]*[^\s$`\\])?)(?<!US)\$(?!\w)",
    re.DOTALL,
)
_TASK = re.compile(r"\[([ xX])\]\s+")
_DIRECTED = frozenset({"paragraph_open", "heading_open", "list_item_open", "blockquote_open", "th_open", "td_open"})


def extend(renderer: MarkdownIt) -> None:
    """Add the rules to a renderer."""
    renderer.inline.ruler.before("escape", "formula", _formula)
    renderer.core.ruler.push("tasks", _tasks)
    renderer.core.ruler.push("directions", _directions)
    rules = {"formula": _formula_html, "task": _task_html, "fence": _code_html, "code_block": _code_html}
    for name, rule in {**rules, "table_open": _table_open, "table_close": _table_close}.items():
        renderer.add_render_rule(name, rule)


def direction(text: str) -> str:
    """The attribute of an element whose text may run from right to left; empty for other text."""
    return ' dir="auto"' if _RIGHT_TO_LEFT.search(text) else ""


def _formula(state: StateInline, silent: bool) -> bool:
    """Inline rule: `$a$` and `\\(a\\)` in a line, `$$a$$` and `\\[a\\]` on a line of their own."""
    match = _FORMULA.match(state.src, state.pos) if state.src[state.pos] in "$\\" else None
    if match is None:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content = next(filter(None, match.groups())).strip()
        token.markup = "display" if match["b"] or match["c"] else ""
    state.pos = match.end()
    return True


def _formula_html(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    tex, kind = escape(tokens[index].content), tokens[index].markup
    return f'<span class="math {kind}" data-tex="{tex}"><code>{tex}</code></span>'


def _tasks(state: StateCore) -> None:
    """Core rule: an item of a list that begins with `[ ]` or `[x]` gets a box."""
    for item, token in zip(state.tokens, state.tokens[2:], strict=False):
        match = _TASK.match(token.content) if item.type == "list_item_open" and token.type == "inline" else None
        if match is None or not token.children or token.children[0].type != "text":
            continue
        first = token.children[0]
        first.content = first.content[match.end() :]
        box = Token("task", "", 0, meta={"done": match[1] != " "})
        token.children.insert(0, box)
        item.attrJoin("class", "task")


def _task_html(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    done = tokens[index].meta["done"]
    label = "done" if done else "to do"
    return f'<i class="box{" done" if done else ""}" role="img" aria-label="{label}"></i>'


def _directions(state: StateCore) -> None:
    """Core rule: with a letter that runs from right to left anywhere, every block finds its own direction."""
    if _RIGHT_TO_LEFT.search(state.src):
        for token in state.tokens:
            if token.type in _DIRECTED:
                token.attrSet("dir", "auto")


def _code_html(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A block of code with its language and a button to copy it. While an answer is written, it has no button and no colours."""
    code, language = tokens[index].content, (tokens[index].info.split() or [""])[0]
    name = f"<span>{escape(language)}</span>"
    if env.get("is_live"):
        return f'<div class="code"><p>{name}</p><pre dir="ltr"><code>{escape(code)}</code></pre></div>'
    return (
        f'<div class="code" data-source="{escape(code.rstrip(chr(10)))}"><p>{name}<button type="button" data-do="copy" '
        f'data-id="">Copy</button></p><pre dir="ltr"><code>{coloured(code, language)}</code></pre></div>'
    )


@lru_cache(maxsize=256)
def coloured(code: str, language: str) -> str:
    """Code as HTML with the classes of Pygments; plain if the language is unknown or the code is long."""
    if not language or len(code) > MAX_COLOURED:
        return escape(code)
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(code)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


def _table_open(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return '<div class="wide"><table>\n'


def _table_close(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "</table></div>\n"
