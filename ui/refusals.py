"""Refusals: the reason why a question has no answer, the ways out, and both as HTML in the thread.

A way out is a verb and its target. page.js turns a click on its button into the event of the verb: `turn_on`, `turn_off`,
`take_out`, `edit` or `retry`. Knows no Gradio.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from html import escape

from pitlane import PitlaneError, PromptTooLong
from pitlane.storage.errors import StorageError
from pitlane.storage.types import Document, Message, Refusal

MAX_DOCUMENTS = 3  # buttons to take out a document: for the longest documents
STOPPED = Refusal("it was stopped before its first token.")


def refusal_of(error: Exception, plugins: Iterable[str], default: Iterable[str], documents: Sequence[str]) -> Refusal:
    """An error as a refusal. plugins, default: names in the plan and in the default plan; documents: ids, the longest first."""
    if not isinstance(error, PitlaneError):
        logging.getLogger(__name__).error("an answer failed", exc_info=error)
        return Refusal(f"{type(error).__name__}: {error}; the terminal shows where it happened")
    ways: list[tuple[str, str]] = []
    if isinstance(error, PromptTooLong):
        droppers = re.findall(r"\bturn on (\w+)", str(error))  # plugins that the engine names as a way out
        ways = [*(("turn_on", name) for name in droppers), *(("take_out", key) for key in documents[:MAX_DOCUMENTS])]
        ways.append(("edit", ""))
    elif not isinstance(error, StorageError):
        ways = [("turn_off", name) for name in _suspects(str(error), list(plugins), set(default))]
    return Refusal(str(error), tuple(ways))


def _suspects(message: str, plugins: list[str], default: set[str]) -> list[str]:
    """Plugins that an error names. If it names none: plugins that are not in the default plan."""
    named = [name for name in plugins if re.search(rf"\b{re.escape(name)}\b", message)]
    return named or [name for name in plugins if name not in default]


def refusal_html(message: Message, documents: Iterable[Document], is_last: bool) -> str:
    """The refusal of a message, with buttons if it is the last message. documents: the attached documents."""
    refusal, is_question = message.refusal, message.role == "user"
    if (not is_last and not (is_question and refusal)) or (not is_question and refusal is None):
        return ""
    buttons = _buttons(message, refusal, documents) if is_last else ""
    if refusal is None:
        return f'<div class="refusal pending"><p>No answer yet.</p>{buttons}</div>'
    heading = "No answer" if is_question else "No new answer"
    return f'<div class="refusal" role="alert"><p><b>{heading}:</b> {escape(refusal.reason)}</p>{buttons}</div>'


def _buttons(message: Message, refusal: Refusal | None, documents: Iterable[Document]) -> str:
    titles, pieces = {document.content_hash[:12]: document.title for document in documents}, []
    for verb, target in refusal.ways if refusal else ():
        if verb == "turn_off":
            pieces.append(_button(verb, target, f"Turn off {target}", "Turn the plugin off and ask again"))
        elif verb == "turn_on":
            pieces.append(_button(verb, target, f"Turn on {target}", "Turn the plugin on and ask again"))
        elif verb == "take_out" and target in titles:
            pieces.append(
                _button(verb, target, f"Take out {titles[target]}", "Take it out of this conversation and ask again")
            )
        elif verb == "edit" and message.role == "user":
            pieces.append(_button(verb, str(message.id), "Edit the question", ""))
    pieces.append(_button("retry", str(message.id), "Ask again", ""))
    return f'<div class="ways">{"".join(pieces)}</div>'


def _button(verb: str, target: str, label: str, title: str) -> str:
    return (
        f'<button type="button" data-do="{verb}" data-id="{escape(target)}" title="{escape(title)}">'
        f"{escape(label)}</button>"
    )
