"""A conversation as a file: Markdown to read, JSON to process. Knows no server and no page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound
from pitlane.storage.types import Conversation
from pitlane.ui.render import one_line, short_name

KINDS = {"md": "text/markdown; charset=utf-8", "json": "application/json"}


class File(NamedTuple):
    """An exported file. name: safe in a header and on every file system."""

    name: str
    mime: str
    text: str


def export(store: Store, conversation_id: str, kind: str) -> File:
    """Export the shown messages of a conversation. Raises NotFound for an unknown conversation or kind."""
    if kind not in KINDS:
        raise NotFound(f"no export as {kind}; the kinds are {', '.join(KINDS)}")
    conversation = store.conversations.get(conversation_id)
    stored = {row.id: row.title for row in store.documents.list()}
    titles = [stored.get(key, key) for key in conversation.document_ids]
    text = as_markdown(conversation, titles) if kind == "md" else as_json(conversation, titles)
    return File(f"{_slug(conversation.title) or conversation.id}.{kind}", KINDS[kind], text)


def as_markdown(conversation: Conversation, documents: Sequence[str]) -> str:
    """The conversation to read. Answers are Markdown already; a question stands as a quotation."""
    parts = [f"# {one_line(conversation.title) or 'Conversation'}", _day(conversation.created)]
    if documents:
        parts.append("Documents: " + ", ".join(map(one_line, documents)))
    for message in conversation.messages:
        if message.role == "user":
            parts.append("\n".join(f"> {line}" for line in message.text.splitlines()))
        else:
            parts.append(message.text)
            if message.stats:
                parts.append(f"*{_stats_words(message.stats)}*")
        if message.refusal is not None:
            parts.append(f"*No answer: {message.refusal.reason}*")
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation, documents: Sequence[str]) -> str:
    """The conversation with token ids, stats and refusals."""
    messages = [{name: value for name, value in asdict(m).items() if name != "versions"} for m in conversation.messages]
    whole = {
        "id": conversation.id,
        "title": conversation.title,
        "model": conversation.model,
        "created": conversation.created,
        "documents": list(documents),
        "messages": messages,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False)


def _stats_words(stats: Any) -> str:
    speed = f", {stats['tokens_per_second']:.1f} tok/s" if stats.get("tokens_per_second") else ""
    plugins = ", ".join(stats.get("plugins") or ()) or "no plugins"
    model = f"{short_name(str(stats['model']))}; " if stats.get("model") else ""
    return f"{model}{plugins}; {stats.get('exactness', '')}; seed {stats.get('seed')}{speed}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
