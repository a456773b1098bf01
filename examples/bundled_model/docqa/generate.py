"""Conversations about generated documents as JSON lines: `python -m bundled_model.docqa.generate --out FILE`.

A line is a conversation: {"domain": ..., "messages": [{"role", "content"}, ...]}. Messages of the assistant also hold `kind` and,
if the answer has a value, `focus` (the value as it stands in the answer) and `page`. The random generator of conversation i is
seeded with split, seed and i, so that no two splits draw the same conversation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bundled_model.docqa.chat import small_talk, thanks
from bundled_model.docqa.document import document_message, make_document
from bundled_model.docqa.domains import SPLITS, domains
from bundled_model.docqa.phrases import SYSTEMS
from bundled_model.docqa.questions import Interview, Turn, title_turn


@dataclass(frozen=True, slots=True)
class Settings:
    """What to draw. min_chars, max_chars: length of the document; turns: questions about it, at most. Shares are from 0 to 1."""

    split: str = "train"
    seed: str = "0"
    min_chars: int = 200
    max_chars: int = 1000
    turns: int = 8
    unique_share: float = 0.4
    unknown_share: float = 0.12
    chat_share: float = 0.03


def make_system(rng: Random) -> str:
    """Return a user's own system text; in most cases none."""
    return rng.choice(SYSTEMS) if rng.random() < 0.2 else ""


def conversation(settings: Settings, number: int) -> dict[str, Any]:
    """Draw conversation `number` of the settings."""
    rng = Random(f"{settings.split}:{settings.seed}:{number}")
    if rng.random() < settings.chat_share:
        chat = [Turn(question, answer, "chat") for question, answer in small_talk(rng)]
        return {"domain": "", "messages": _messages("", chat)}
    pool = domains(settings.split)
    unique = rng.random() < settings.unique_share
    document = make_document(rng, rng.randint(settings.min_chars, settings.max_chars), unique, pool)
    turns = Interview(rng, document, pool, settings.unknown_share).turns(settings.turns)
    if settings.split in ("train", "values") and rng.random() < 0.05:
        turns.insert(0, title_turn(rng, document))
    if rng.random() < 0.04:
        turns.append(Turn(*thanks(rng), "chat"))
    system = document_message(document.title, document.pages, make_system(rng))
    return {"domain": document.domain.name, "messages": _messages(system, turns)}


def _messages(system: str, turns: list[Turn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        answer: dict[str, Any] = {"role": "assistant", "content": turn.answer, "kind": turn.kind}
        if turn.focus:
            answer |= {"focus": turn.focus, "page": turn.page}
        messages.append(answer)
    return messages


def conversations(settings: Settings, number: int) -> Iterator[dict[str, Any]]:
    """Yield the first `number` conversations of the settings."""
    return (conversation(settings, index) for index in range(number))


def write(path: Path, settings: Settings, number: int) -> int:
    """Write conversations as JSON lines; return the number of turns."""
    turns = 0
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(settings, number):
            turns += sum(message["role"] == "assistant" for message in row["messages"])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return turns


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description="Write conversations about generated documents as JSON lines.")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--number", type=int, default=1000, help="conversations")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", default="0", help="any text; equal seeds give equal files")
    parser.add_argument("--min-chars", type=int, default=200, help="length of the shortest document")
    parser.add_argument("--max-chars", type=int, default=1000, help="length of the longest document")
    parser.add_argument("--turns", type=int, default=8, help="questions about a document, at most")
    parser.add_argument("--unique-share", type=float, default=0.4, help="documents that state each topic once")
    parser.add_argument("--unknown-share", type=float, default=0.12, help="questions without an answer")
    parser.add_argument("--chat-share", type=float, default=0.03, help="conversations without a document")
    values = vars(parser.parse_args(arguments))
    path, number = values.pop("out"), values.pop("number")
    if not 0 < values["min_chars"] <= values["max_chars"]:
        parser.error(f"--min-chars must be from 1 to --max-chars, got {values['min_chars']} and {values['max_chars']}")
    start = time.perf_counter()
    turns = write(path, Settings(**values), number)
    seconds = time.perf_counter() - start
    print(f"{path}: {number} conversations, {turns} turns, {seconds:.1f} s, {number / seconds * 60:.0f} a minute")


if __name__ == "__main__":
    main()
