"""Rows of the table of messages as messages, and messages as the turns of a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pitlane.storage.types import Message, Refusal

_TITLE_CHARS = 60


class Turn(Protocol):
    """The part of a message that a prompt uses."""

    @property
    def role(self) -> str: ...

    @property
    def text(self) -> str: ...


def shown_messages(rows: Sequence[dict[str, Any]]) -> Iterator[Message]:
    """The shown messages in order, from all rows of a conversation."""
    families: dict[tuple[int | None, str], list[int]] = {}
    children: dict[int | None, dict[str, Any]] = {}
    for row in rows:
        families.setdefault((row["parent"], row["role"]), []).append(row["id"])
        if row["is_shown"]:
            children[row["parent"]] = row
    parent: int | None = None
    while parent in children:
        row = children[parent]
        versions = families[parent, row["role"]]
        parent = row["id"]
        yield message_of(row, tuple(versions) if len(versions) > 1 else ())


def message_of(row: dict[str, Any], versions: tuple[int, ...] = ()) -> Message:
    return Message(
        id=row["id"],
        conversation_id=row["conversation_id"],
        role=row["role"],
        text=row["text"],
        token_ids=None if row["token_ids"] is None else tuple(json.loads(row["token_ids"])),
        stats=None if row["stats"] is None else json.loads(row["stats"]),
        created=row["created"],
        refusal=None if row["refusal"] is None else _refusal(**json.loads(row["refusal"])),
        versions=versions,
    )


def ids_text(token_ids: Sequence[int] | None) -> str | None:
    return None if token_ids is None else json.dumps([int(token) for token in token_ids], separators=(",", ":"))


def stats_text(stats: Mapping[str, Any] | None) -> str | None:
    return None if stats is None else json.dumps(dict(stats), default=str)


def _refusal(reason: str, ways: Sequence[Sequence[str]]) -> Refusal:
    return Refusal(reason, tuple((verb, target) for verb, target in ways))


def turns(messages: Sequence[Turn]) -> list[dict[str, str]]:
    """Turn messages into the turns of a prompt, without earlier questions that have no answer."""
    followers = [*(message.role for message in messages[1:]), "assistant"]  # the last question will get its answer
    return [
        {"role": message.role, "content": message.text}
        for message, follower in zip(messages, followers, strict=False)
        if message.role != "user" or follower == "assistant"
    ]


def first_words(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _TITLE_CHARS:
        return line
    return line[:_TITLE_CHARS].rsplit(" ", 1)[0] + "…"
