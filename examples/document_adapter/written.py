"""Chats about documents that were written by hand: the text files of `documents/`.

A file holds documents of a kind:

    === harbour-fees.pdf
    [p. 1]
    Text of the first page.

    [p. 2]
    Text of the second page.
    ---
    Q: How much does a night cost?
    A: £14.50 a night [p. 1].
    Q: And in winter?
    A: The document does not say that.

A document is asked several times, each time with its questions in another order; a follow-up stays behind its question. In some
chats, several documents make a long one, so that answers also cite later pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from bundled_model.docqa.document import document_message
from bundled_model.docqa.phrases import SYSTEMS

FOLDER = Path(__file__).parent / "documents"
REFUSAL = "The document does not say that."
LONG_SHARE = 0.3  # of the chats are about two to four documents joined
TURNS = 10  # questions of a chat, at most
SYSTEM_SHARE = 0.15  # of the chats have a user's own system text
FOLLOW_UP = re.compile(
    r"(?:and|but|so)\b|.*\b(?:that|those|these|it|its|they|them|their|he|him|his|she|her|there|then)\b", re.I
)
WHOLE = re.compile(
    r"\bsumm|\babout\?|this document|kind of (?:document|text)|\btitle\b", re.I
)  # questions about a whole document
HELD_OUT = 12  # about every twelfth document is kept for the evaluation
CITATION = re.compile(r"\[p\. (\d+)\]")


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Written(NamedTuple):
    """A document: its title, the text of its pages, and its questions in the order of the file."""

    title: str
    pages: list[str]
    turns: list[Turn]


def parse(text: str) -> list[Written]:
    """Read the documents of a file. Raises ValueError with the title of a document that breaks the format."""
    documents = []
    for block in re.split(r"(?m)^=== ", text)[1:]:
        title, _, rest = block.partition("\n")
        body, mark, talk = rest.partition("\n---\n")
        pages = re.split(r"(?m)^\[p\. (\d+)\]\n", body)
        lines = [line for line in talk.splitlines() if line.strip()]
        roles = "".join(line[:3] for line in lines)
        if not mark or pages[0].strip() or [int(page) for page in pages[1::2]] != list(range(1, len(pages) // 2 + 1)):
            raise ValueError(f"{title}: pages [p. 1], [p. 2], ..., then ---")
        if not lines or roles != "Q: A: " * (len(lines) // 2):
            raise ValueError(f"{title}: lines `Q: ...` and `A: ...` in turn")
        texts = [line[3:].strip() for line in lines]
        turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        documents.append(Written(title.strip(), [page.strip("\n") for page in pages[2::2]], turns))
    return documents


def read(folder: Path = FOLDER) -> list[Written]:
    """Read the documents of all files of a folder."""
    return [document for path in sorted(folder.glob("*.txt")) for document in parse(path.read_text(encoding="utf-8"))]


def groups(turns: list[Turn]) -> list[list[Turn]]:
    """Part the turns: each question with the follow-ups behind it, which need it to be understood."""
    parts: list[list[Turn]] = []
    for turn in turns:
        if parts and FOLLOW_UP.match(turn.question):
            parts[-1].append(turn)
        else:
            parts.append([turn])
    return parts


def joined(documents: list[Written]) -> Written:
    """Make one document of several: the pages one after the other, citations with the new numbers, the title of the first."""
    pages: list[str] = []
    turns: list[Turn] = []
    for document in documents:
        before = len(pages)

        def moved(match: re.Match[str], before: int = before) -> str:
            return f"[p. {int(match[1]) + before}]"

        kept = [turn for turn in document.turns if not WHOLE.search(turn.question)]
        turns += [Turn(turn.question, CITATION.sub(moved, turn.answer)) for turn in kept]
        pages += document.pages
    return Written(documents[0].title, pages, turns)


def shuffled(rng: Random, turns: list[Turn]) -> list[Turn]:
    """Draw a new order of at most `TURNS` turns."""
    parts = groups(turns)
    rng.shuffle(parts)
    return [turn for part in parts for turn in part][:TURNS]


def focus(answer: str, pages: list[str]) -> str:
    """Return the part of an answer that is quoted from the pages, '' if there is none: the first number with its words, else the
    longest run of words.
    """
    text, words = " ".join(" ".join(pages).split()), CITATION.sub("", answer).rstrip(". ").split()
    runs, first = [], 0
    while first < len(words):
        last = first
        while last < len(words) and " ".join(words[first : last + 1]).strip(",;:") in text:
            last += 1
        runs.append(" ".join(words[first:last]).strip(",;:"))
        first = max(last, first + 1)
    with_number = [run for run in runs if re.search(r"\d", run)]
    return with_number[0] if with_number else max(runs, key=len, default="")


def chat(rng: Random, document: Written) -> dict[str, Any]:
    """Make a conversation about a document. Each answer names its focus: the part that is quoted."""
    system = rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE else ""
    messages = [{"role": "system", "content": document_message(document.title, document.pages, system)}]
    for question, answer in shuffled(rng, document.turns):
        cited = [document.pages[int(page) - 1] for page in CITATION.findall(answer)]
        quoted = focus(answer, cited) if cited else ""
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "focus": quoted})
    return {"domain": "written", "messages": messages}


def chats(documents: list[Written], times: int) -> Iterator[dict[str, Any]]:
    """Yield chats about all documents, `times` times each."""
    for time in range(times):
        rng = Random(f"written:{time}")
        order = rng.sample(documents, len(documents))
        while order:
            number = rng.randint(2, 4) if rng.random() < LONG_SHARE else 1
            parts, order = order[:number], order[number:]
            yield chat(rng, joined(parts) if len(parts) > 1 else parts[0])


def split(documents: list[Written]) -> tuple[list[Written], list[Written]]:
    """Part the documents: those to train on, and those held out, chosen by a hash of the title."""
    held_out = [document for document in documents if sha256(document.title.encode()).digest()[0] % HELD_OUT == 0]
    return [document for document in documents if document not in held_out], held_out
