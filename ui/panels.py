"""The page's lists and the thread as HTML: conversations, documents, messages, the empty page.

Pure functions of stored rows. page.js turns clicks on elements with `data-do` into events: data-do is the name of the event,
data-id its target. All text from users, files and models is escaped.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any

from pitlane.storage.types import Conversation, Document, Message, SavedPrefix, SearchHit, StoredDocument
from pitlane.ui.chat_flow import CUT, dotted, number, reading_html, stats_html
from pitlane.ui.effects import Roles
from pitlane.ui.markup import highlighted, markdown_html, plain_html
from pitlane.ui.reading import page_read, page_text
from pitlane.ui.refusals import refusal_html
from pitlane.ui.render import size

if TYPE_CHECKING:
    from pitlane import Result, Segment

# The bundled model and SmolLM2 answer these with the right value and the right page.
SAMPLE_QUESTIONS = (
    "When is the track open?",
    "What is the address of the club?",
    "What is the phone number of the office?",
)
# SmolLM2 answers this over the sample with 82 tokens, most of them quotes, so that drafts from the prompt are accepted. The bundled
# model has no answer of 32 tokens, so the page offers it nothing.
EXPERIMENT = "Summarize the first page."
COMPARE = (
    '<p class="quiet">Or <button type="button" class="inline" data-do="compare" data-id="">compare plans</button> '
    "on one question, side by side.</p>"
)
_ICONS = {
    "copy": '<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V5a1 1 0 0 1 1-1h9"/>',
    "retry": '<path d="M4 12a8 8 0 1 0 2.5-5.8"/><path d="M4 4v5h5"/>',
    "edit": '<path d="M4 20h4L19 9l-4-4L4 16z"/>',
    "rename": '<path d="M4 20h4L19 9l-4-4L4 16z"/>',
    "remove": '<path d="M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13"/>',
    "dismiss": '<path d="M6 6l12 12M18 6L6 18"/>',
    "compare": '<path d="M4 7h11M4 12h16M4 17h7"/>',
    "file": '<path d="M6 3h8l4 4v14H6z"/><path d="M14 3v4h4M9 12h6M9 16h6"/>',
}


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A stored document in the list of documents.

    tokens: None if they are not counted. saved_bytes: the document's own share of saved KV; None if no KV is saved, 0 if its tokens
    are not counted. reading: share of its KV that is computed.
    """

    stored: StoredDocument
    attached: bool
    tokens: int | None
    saved_bytes: int | None
    reading: float | None = None


@dataclass(slots=True)
class Live:
    """An unfinished answer. done, total, cached: tokens of the prompt. Then its text, its tokens and their speed.

    accepted: half-open ranges of its tokens that were accepted draft tokens. segments: the documents in the prompt.
    first_token: the time of the first token, on the clock of `time.perf_counter`; 0 before it.
    """

    done: int = 0
    total: int = 0
    cached: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    first_token: float = 0.0
    tokens_per_second: float | None = None
    loading: bool = False
    accepted: list[tuple[int, int]] = field(default_factory=list)
    result: Result | None = None
    segments: Sequence[Segment] = ()


@dataclass(slots=True, eq=False)
class Waiting:
    """A question that waits until its conversation's answer is complete. key: names it in events.

    is_asked: it left the line for an answer. A question that leaves the line in another way returns to the box.
    """

    session: str
    text: str
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    is_taken_back: bool = False
    is_asked: bool = False


def icon(name: str) -> str:
    """A line icon of 24 units, drawn in the colour of the text."""
    return f'<svg viewBox="0 0 24 24" aria-hidden="true">{_ICONS[name]}</svg>'


def button(do: str, target: object, label: str, symbol: str | None = None, css: str = "tool") -> str:
    """An icon button that page.js turns into the event `do` about `target`."""
    return (
        f'<button type="button" class="{css}" data-do="{do}" data-id="{escape(str(target))}" title="{escape(label)}" '
        f'aria-label="{escape(label)}">{icon(symbol or do)}</button>'
    )


def button_text(do: str, target: object, label: str) -> str:
    """A button with words that page.js turns into the event `do` about `target`."""
    return f'<button type="button" data-do="{do}" data-id="{escape(str(target))}">{escape(label)}</button>'


def conversations_html(rows: Iterable[Conversation], current: str | None, now: float) -> str:
    """The list of conversations under headings of age, with the open conversation marked."""
    pieces, heading = [], ""
    for row in rows:
        age = _age(row.updated, now)
        if age != heading:
            heading = age
            pieces.append(f"<h4>{age}</h4>")
        pieces.append(_conversation(row.id, row.title, current))
    return "".join(pieces) or '<p class="quiet">No conversations yet. What you ask is kept here, on this machine.</p>'


def hits_html(hits: Sequence[SearchHit], text: str, current: str | None) -> str:
    """The hits of a search, one row per conversation."""
    first_hits: dict[str, SearchHit] = {}
    for hit in hits:
        first_hits.setdefault(hit.conversation_id, hit)
    words = text.split()
    rows = (
        _conversation(
            hit.conversation_id, hit.title, current, highlighted(hit.snippet, words) if hit.message_id else ""
        )
        for hit in first_hits.values()
    )
    return "".join(rows) or f'<p class="quiet">Nothing found for “{escape(text.strip())}”.</p>'


def _conversation(key: str, title: str, current: str | None, snippet: str = "") -> str:
    here = ' aria-current="true"' if key == current else ""
    excerpt = f"<small>{snippet}</small>" if snippet else ""
    return (
        f'<div class="item"{here}><button type="button" class="open" data-do="open" data-id="{key}">'
        f"<span>{escape(title or 'New conversation')}</span>{excerpt}</button>"
        f'<span class="tools">{_exports(key)}{button("rename", key, "Rename")}{button("remove", key, "Delete")}</span></div>'
    )


def _exports(key: str) -> str:
    """Links that save a conversation as a file (ui/export.py)."""
    links = []
    for kind, name in (("md", "Markdown"), ("json", "JSON")):
        label = f'title="Save as {name}" aria-label="Save as {name}"'
        links.append(f'<a class="tool" href="./pitlane/export/{key}.{kind}" download {label}>{kind}</a>')
    return "".join(links)


def _age(then: float, now: float) -> str:
    days = (datetime.fromtimestamp(now).date() - datetime.fromtimestamp(then).date()).days
    return "Today" if days <= 0 else "Yesterday" if days == 1 else "This week" if days < 7 else "Earlier"


def documents_html(rows: Sequence[DocumentRow]) -> str:
    """The list of documents: a checkbox to attach a document, its sizes, its progress while its KV is computed."""
    return (
        "".join(map(_document, rows))
        or '<p class="quiet">No documents yet. PDF, text and Markdown files can be read.</p>'
    )


def _document(row: DocumentRow) -> str:
    stored = row.stored
    facts = [f"{number(stored.num_pages)} page{'s' if stored.num_pages != 1 else ''}"]
    facts.append(f"{number(row.tokens)} tokens" if row.tokens is not None else f"{number(stored.num_chars)} characters")
    if row.reading is not None:
        facts = [f"reading {100 * row.reading:.0f} %"]
    elif row.saved_bytes is not None:
        share = f", {size(row.saved_bytes)}" if row.saved_bytes else ""
        facts.append(f'<span title="computed once, read back from disk">KV saved{share}</span>')
    bar = f'<span class="bar"><i style="width:{100 * row.reading:.0f}%"></i></span>' if row.reading is not None else ""
    state = "true" if row.attached else "false"
    hint = "Take it out of this conversation" if row.attached else "Ask about it in this conversation"
    return (
        f'<div class="item document"><button type="button" class="attach" role="checkbox" aria-checked="{state}" '
        f'data-do="attach" data-id="{stored.id}" title="{hint}"><i class="tick"></i>'
        f'<span>{escape(stored.title)}<small class="dots">{dotted(facts)}</small></span></button>'
        f'<span class="tools">{button("discard", stored.id, "Remove the document and its saved KV", "remove")}</span>'
        f"{bar}</div>"
    )


def notice_html(problems: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """Problems and remarks about added files, with a button to dismiss them; empty without any."""
    if not problems and not remarks:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in (*problems, *remarks))
    kind, role = ("problem", "alert") if problems else ("remark", "status")
    return f'<div class="{kind}" role="{role}"><div>{lines}</div>{button("dismiss", "", "Dismiss")}</div>'


def thread_html(
    messages: Sequence[Message],
    documents: Sequence[Document],
    roles: Roles,
    conversation_id: str | None,
    answering: bool = False,
    offer: str = "",
    model: str = "",
    experiment: str = "",
) -> str:
    """All finished messages; without any, the empty page. offer: HTML of the empty page about another model.

    model: the model that answers now, and can go on with its own cut answer. experiment: a question of the empty page with a long
    answer.
    """
    if not messages and not answering:
        return empty_html(documents, offer, experiment)
    models = {message.stats.get("model") for message in messages if message.stats}
    followers = [*(message.role for message in messages[1:]), "assistant" if answering else ""]
    pieces = [
        _message(message, documents, roles, not follower, len(models) > 1, model)
        + ("" if follower == "assistant" else refusal_html(message, documents, not follower))
        for message, follower in zip(messages, followers, strict=False)
    ]
    return f'<div class="thread" data-conversation="{conversation_id or ""}">{"".join(pieces)}</div>'


def _message(
    message: Message,
    documents: Sequence[Document],
    roles: Roles,
    last: bool,
    names_model: bool = False,
    model: str = "",
) -> str:
    source = f'data-source="{escape(message.text)}"'
    if message.role == "user":
        tools = button("copy", message.id, "Copy") + button("edit", message.id, "Edit and ask again")
        return (
            f'<article class="message user" data-id="{message.id}" {source}><div class="body">{plain_html(message.text)}</div>'
            f'{versions_html(message, "question")}<div class="tools">{tools}</div></article>'
        )
    tools = button("copy", message.id, "Copy")
    if last:
        tools += button("retry", message.id, "Ask again, with the plugins that are on now")
    if message.stats:
        tools += button("compare", message.id, "Compare plans on this question, with this seed")
    go_on = button_text("go_on", message.id, "Continue") if last and can_go_on(message, model) else ""
    tools = f'{go_on}{versions_html(message, "answer")}<span class="tools">{tools}</span>'
    stats = stats_html(message.stats, roles, tools, names_model, message.text) if message.stats else tools
    body = (
        markdown_html(message.text, documents) if message.text.strip() else '<p class="quiet">The answer is empty.</p>'
    )
    return (
        f'<article class="message answer" data-id="{message.id}" {source}><div class="body">{body}</div>'
        f"{stats}</article>"
    )


def can_go_on(message: Message, model: str) -> bool:
    """Whether an answer was cut and its tokens are those of this model."""
    stats = message.stats or {}
    return bool(message.token_ids) and stats.get("finish_reason") in CUT and stats.get("model") == model


def versions_html(message: Message, kind: str) -> str:
    """`2/3` with arrows to the versions before and after; empty for the only version."""
    versions = message.versions
    if message.id not in versions:
        return ""
    place = versions.index(message.id)
    arrows = [
        f'<button type="button" data-do="version" data-id="{versions[target] if 0 <= target < len(versions) else ""}" '
        f'aria-label="{label} version of this {kind}" title="{label} version"'
        f"{'' if 0 <= target < len(versions) else ' disabled'}>{sign}</button>"
        for target, label, sign in ((place - 1, "Earlier", "‹"), (place + 1, "Later", "›"))
    ]
    return f'<span class="versions">{arrows[0]}<span>{place + 1}/{len(versions)}</span>{arrows[1]}</span>'


def waiting_html(questions: Sequence[Waiting]) -> str:
    """Questions that wait for the end of an answer, each with a button that takes it back."""
    rows = "".join(
        f'<article class="message user waiting"><div class="body">{plain_html(question.text)}</div>'
        f"<small>waits its turn</small>{button('take_back', question.key, 'Take it back', 'dismiss')}</article>"
        for question in questions
    )
    return f'<div class="thread">{rows}</div>' if rows else ""


def live_html(live: Live, documents: Sequence[Document]) -> str:
    """The unfinished answer, or the progress of loading and prefill before it."""
    if live.loading:
        inner = '<div class="reading" role="status"><span>Loading the weights for this set of plugins</span></div>'
    elif not live.num_tokens:
        place = page_text(page_read(documents, live.segments, live.done))
        inner = reading_html(live.done, live.total, live.cached, place)
    else:
        facts = [f"<b>{number(live.num_tokens)}</b> tokens"]
        facts += [f"<b>{live.tokens_per_second:.1f}</b> tok/s"] if live.tokens_per_second else []
        line = f'<p class="line dots">{dotted(facts)}</p>'
        body = markdown_html(live.text, documents, is_live=True)
        inner = f'<div class="body writing">{body}</div><footer class="stats">{line}</footer>'
    return f'<div class="thread"><article class="message answer live" aria-live="polite">{inner}</article></div>'


def empty_html(documents: Sequence[Document], offer: str = "", experiment: str = "") -> str:
    """The page without messages: the first steps, and three questions about the sample to click. offer: HTML at the end.

    experiment: a question about the sample whose answer is long enough to compare speeds; empty for no such question.
    """
    if documents and not any(document.title == "sample.pdf" for document in documents):
        names = ", ".join(escape(document.title) for document in documents)
        return (
            f'<div class="empty"><h2>Ask about {names}</h2><p>The document is read once and its KV is kept, so every later '
            f"question starts from there. Toggle a plugin between two questions to see what it saves.</p>{COMPARE}{offer}</div>"
        )
    questions = "".join(button_text("try", question, question) for question in SAMPLE_QUESTIONS)
    trial = ""
    if experiment:
        trial = (
            '<p class="quiet">An experiment, with an answer long enough to compare speeds: ask this, turn on the plugin under '
            f'“Try first”, and ask again.</p><div class="questions">{button_text("try", experiment, experiment)}</div>'
        )
    return (
        '<div class="empty"><h2>Ask a document</h2><p>Add a PDF under Documents, or drop one anywhere on this page. '
        "Or ask the sample, a four-page track guide:</p>"
        f'<div class="questions">{questions}</div>'
        '<p class="quiet">Then switch a plugin on or off and ask again: each answer shows what the plugin saved, and whether '
        f"it is still the same, token by token.</p>{trial}{COMPARE}{offer}</div>"
    )


def counted(
    documents: Iterable[StoredDocument],
    attached: Iterable[str],
    tokens: Callable[[str], int | None],
    prefixes: Iterable[SavedPrefix],
    reading: Mapping[str, float],
) -> list[DocumentRow]:
    """Rows of the document list, with the attached documents first."""
    attached, saved = list(attached), defaultdict[str | None, list[SavedPrefix]](list)
    for prefix in prefixes:
        saved[prefix.document_hash].append(prefix)
    rows = [
        DocumentRow(
            row,
            row.id in attached,
            tokens(row.id),
            own_bytes(tokens(row.id), saved[row.content_hash]),
            reading.get(row.id),
        )
        for row in documents
    ]
    return sorted(rows, key=lambda row: not row.attached)


def own_bytes(num_tokens: int | None, prefixes: Sequence[SavedPrefix]) -> int | None:
    """A document's share of its saved KV. The files also hold the KV of all tokens before the document."""
    if not prefixes:
        return None
    return sum(prefix.num_bytes * min(num_tokens or 0, prefix.num_tokens) // prefix.num_tokens for prefix in prefixes)


def last_stats(messages: Sequence[Message]) -> Mapping[str, Any] | None:
    """Stats of the latest answer that has stats."""
    return next((message.stats for message in reversed(messages) if message.stats), None)
