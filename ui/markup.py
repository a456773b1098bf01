"""Text of users and models as safe HTML: Markdown without raw HTML or images, page citations checked against documents.

Images are left out, because an answer could make the browser fetch any address. Links open in a new tab and send no referrer. A
citation `[p. 3]` becomes a chip. The chip tells whether the page exists, and whether it holds the figures and quotes of the
sentence; the spelling of quotation marks, dashes, accents and ligatures does not matter. Knows no Gradio.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

from pitlane.storage.types import Document
from pitlane.ui.rich_text import direction, extend

_CITATION = re.compile(r"\[p\.\s?(\d{1,5})\]")
_THOUGHT = re.compile(r"^\s*<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_VALUE = re.compile(
    r'"([^"\n]{3,200})"|[“„]([^“”\n]{3,200})[“”]|«([^»\n]{3,200})»|‘([^\n]{3,200}?)’(?!\w)|(\d[\d.,:/]*\d|\d)'
)
_QUOTES = frozenset("\"'`´ʹʼˈ‘’‚‛“”„‟′″«»‹›<>")  # a prompt writes ‹ for some < of a document
_KEPT_FORMS = ("<super>", "<sub>", "<fraction>", "<circle>")  # 10² is not 102
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z\[])|\n")


def _link_open(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return str(self.renderToken(tokens, index, options, env))


def _citation(state: StateInline, silent: bool) -> bool:
    """Inline rule: `[p. 3]` becomes a chip if there are documents to check it against (`env["documents"]`)."""
    match = _CITATION.match(state.src, state.pos)
    documents = state.env.get("documents")
    if match is None or not documents:
        return False
    if not silent:
        sentence = _sentence(state.src, match.start())
        state.push("citation", "", 0).content = citation_html(int(match[1]), sentence, documents)
    state.pos = match.end()
    return True


def _citation_html(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    return str(tokens[index].content)


def _renderer() -> MarkdownIt:
    renderer = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    renderer.disable("image")
    renderer.add_render_rule("link_open", _link_open)
    renderer.inline.ruler.before("link", "citation", _citation)
    renderer.add_render_rule("citation", _citation_html)
    extend(renderer)
    return renderer


_MARKDOWN = _renderer()


def markdown_html(text: str, documents: Sequence[Document] = (), *, is_live: bool = False) -> str:
    """A model's answer as HTML: reasoning folded, Markdown rendered, citations as chips. is_live: it is being written."""
    thought = _THOUGHT.match(text)
    folded = ""
    if thought:
        reasoning = str(_MARKDOWN.render(thought[1], {"is_live": is_live}))
        folded = thought_html(reasoning, is_live=not thought[0].endswith("</think>"))
        text = text[thought.end() :]
    if is_live:
        text = _closed(text)
    return folded + str(_MARKDOWN.render(text, {"documents": documents, "is_live": is_live}))


def thought_html(reasoning: str, *, is_live: bool = False) -> str:
    """Folded reasoning. is_live: it has no end yet."""
    return f'<details class="thought"><summary>Reasoning{"…" if is_live else ""}</summary>{reasoning}</details>'


class Blocks(NamedTuple):
    """The blocks of an unfinished text as HTML. Later text changes no block before `num_settled`, which begins at line `line`."""

    html: list[str]
    num_settled: int
    line: int


def blocks_html(text: str, documents: Sequence[Document] = ()) -> Blocks:
    """Render an unfinished text block by block.

    A block is settled when the first line of the next block is complete: until then, another letter may join the two blocks.
    """
    env: dict[str, Any] = {"documents": documents}
    tokens = _MARKDOWN.parse(_closed(text), env)
    starts = [i for i, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0 and token.map is not None]
    if not starts:
        return Blocks([], 0, 0)
    pieces = [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    lines = [(piece[0].map or [0])[0] for piece in pieces]
    is_complete = len(re.findall(r"\r\n?|\n", text)) > lines[-1]
    num_settled = max(0, len(pieces) - (1 if is_complete else 2))
    html = [_rendered(piece, {**env, "is_live": index >= num_settled}) for index, piece in enumerate(pieces)]
    return Blocks(html, num_settled, lines[num_settled])


def _rendered(tokens: Sequence[Any], env: dict[str, Any]) -> str:
    return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, env))


def _closed(text: str) -> str:
    """An unfinished text with the bold words of its last line closed, so that no asterisks flash up while it is written."""
    head, newline, line = text.rpartition("\n")
    if line.count("**") % 2 == 0 or "`" in line or text.count("```") % 2:
        return text
    line = line.rstrip()
    return head + newline + (line.removesuffix("**") if line.endswith("**") else f"{line}**")


def plain_html(text: str) -> str:
    """A user's message as HTML, as it was typed."""
    return f"<p{direction(text)}>{escape(text)}</p>"


def citation_html(page: int, sentence: str, documents: Sequence[Document]) -> str:
    """A citation as a chip. Its class: `missing` page, values `found` or `unfound` on it, none without values in the sentence."""
    texts = [(document.title, document.pages[page - 1].text) for document in documents if page <= len(document.pages)]
    if page < 1 or not texts:
        return f'<span class="cite missing" title="there is no page {page}">p. {page}</span>'
    values = _values(sentence)
    for title, text in texts:
        if values and all(_has(text, value) for value in values):
            quoted = ", ".join(values)
            return (
                f'<span class="cite found" title="{escape(f"{title}, page {page}: found {quoted}")}">p. {page}</span>'
            )
    title = texts[0][0]
    if values:
        reason = f"{title}, page {page}: does not hold {', '.join(values)}"
        return f'<span class="cite unfound" title="{escape(reason)}">p. {page}</span>'
    return f'<span class="cite" title="{escape(f"{title}, page {page}")}">p. {page}</span>'


def _sentence(text: str, end: int) -> str:
    """The text before a citation, from the end of the previous sentence or citation."""
    start = max((match.end() for match in _SENTENCE_END.finditer(text, 0, end)), default=0)
    start = max([start, *(match.end() for match in _CITATION.finditer(text, start, end))])
    return text[start:end]


def _values(sentence: str) -> list[str]:
    """Quotes and figures of a sentence, to look up on a page."""
    return [next(filter(None, match.groups())) for match in _VALUE.finditer(sentence)]


def _has(text: str, value: str) -> bool:
    pattern = re.escape(folded(value).strip(" .,;:-"))
    if not pattern:
        return value in text
    if value[0].isdigit():
        pattern = rf"(?<![\d.,:]){pattern}(?![.,:]?\d)"
    return re.search(pattern, folded(text)) is not None


@lru_cache(maxsize=64)
def folded(text: str) -> str:
    """Text in one spelling for comparison: composed letters, lower case, plain quotes and dashes.

    Invisible characters (soft hyphens, joiners) are left out; a run of blanks and line breaks is one space.
    """
    plain = "".join(map(_plain, unicodedata.normalize("NFC", text)))
    plain = re.sub("'+", "'", re.sub(r"\s*-[\s-]*", "-", plain))
    return unicodedata.normalize("NFC", " ".join(plain.split()).casefold())


@lru_cache(maxsize=4096)
def _plain(letter: str) -> str:
    if letter.isalnum() and letter.isascii():
        return letter
    if letter in _QUOTES:
        return "'"
    category = unicodedata.category(letter)
    if category == "Cf":
        return ""
    if category == "Pd" or letter == "\u2212":
        return "-"
    if unicodedata.decomposition(letter).startswith(_KEPT_FORMS):
        return letter
    return unicodedata.normalize("NFKC", letter)


def highlighted(snippet: str, words: Iterable[str]) -> str:
    """The text of a search hit as HTML, with the searched words marked."""
    text = snippet.replace("[", "").replace("]", "")
    pattern = "|".join(re.escape(word) for word in words if word)
    pieces = re.split(f"({pattern})", text, flags=re.IGNORECASE) if pattern else [text]  # every second piece is a match
    return "".join(f"<mark>{escape(piece)}</mark>" if i % 2 else escape(piece) for i, piece in enumerate(pieces))
