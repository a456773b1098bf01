"""The lists on the left as HTML: conversations, hits of a search, documents, and the notice about added files.

Pure functions of stored rows. All text from users, files and models is escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

from pitlane.storage.types import Conversation, SavedPrefix, SearchHit, StoredDocument
from pitlane.ui.buttons import button
from pitlane.ui.chat_flow import dotted, number
from pitlane.ui.markup import highlighted
from pitlane.ui.render import size


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
