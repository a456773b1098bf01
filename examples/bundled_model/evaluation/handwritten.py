"""Documents written by hand: whether answers hold the right value and cite its page, and whether the unanswerable is refused.

A folder holds:

    text files, with a form feed between pages, or PDFs
    questions.json: a list of {document, question, answer, accept, page}; `accept` lists other spellings
    unanswerable.json (optional): a list of {document, question}

An answer "yes" or "no" must be the first word. Every question begins a chat of its own. The engine's code renders the document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pypdfium2

from bundled_model.evaluation.answering import Message
from bundled_model.evaluation.measures import Mark, Rows, cited_pages, has_value, is_refusal, shares
from pitlane import Document, Page


class Answers(Protocol):
    """A model that answers chats, in order."""

    def answer(self, chats: Sequence[Sequence[Message]]) -> list[str]: ...


class Question(NamedTuple):
    """A question about a document. Without values: the document does not answer it."""

    document: str
    text: str
    values: tuple[str, ...] = ()
    page: int = 0


def document_message(title: str, pages: Sequence[str]) -> Message:
    """Return the system message that carries a document, in the format of the engine."""
    labelled = tuple(Page(index, str(index + 1), text) for index, text in enumerate(pages))
    return {"role": "system", "content": Document(title, "text/plain", labelled, "").text}


def read_pages(path: Path) -> list[str]:
    """Return the pages of a text file or a PDF."""
    if path.suffix == ".pdf":
        with pypdfium2.PdfDocument(path) as pdf:
            texts = [page.get_textpage().get_text_bounded().replace("\r\n", "\n") for page in pdf]
        return ["\n".join(line.rstrip() for line in text.split("\n")).strip() for text in texts]
    return [page.strip("\n") for page in path.read_text(encoding="utf-8").split("\f")]


def question_of(row: dict[str, Any], document: str) -> Question:
    """Make a question from a row of questions.json."""
    return Question(document, row["question"], (row["answer"], *row.get("accept", ())), row.get("page", 0))


def read_questions(folder: Path) -> list[Question]:
    """Read the answerable questions, then the unanswerable ones."""
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    questions = [question_of(row, row["document"]) for row in rows]
    unanswerable = folder / "unanswerable.json"
    if unanswerable.is_file():
        rows = json.loads(unanswerable.read_text(encoding="utf-8"))
        questions += [Question(row["document"], row["question"]) for row in rows]
    return questions


def chats(folder: Path, questions: Sequence[Question]) -> list[list[Message]]:
    """Return the chat that asks each question."""
    names = sorted({question.document for question in questions})
    messages = {name: document_message(name, read_pages(folder / name)) for name in names}
    return [[messages[question.document], {"role": "user", "content": question.text}] for question in questions]


def judge(question: Question, answer: str) -> Mark:
    """Judge an answer."""
    refused = is_refusal(answer)
    if not question.values:
        return Mark(refused=refused)
    page = cited_pages(answer) == {question.page} if question.page else None
    return Mark(value=has_value(question.values, answer), page=page, refused=refused)


def measure(answerer: Answers, folder: Path, questions: Sequence[Question], show: bool = False) -> Rows:
    """Ask the questions. Rows: answerable, with a value, yes/no, unanswerable, then the documents."""
    answers = answerer.answer(chats(folder, questions))
    marks = [judge(question, answer) for question, answer in zip(questions, answers, strict=True)]
    if show:
        for question, answer, mark in zip(questions, answers, marks, strict=True):
            right = mark.refused if mark.value is None else mark.value
            print(f"{'right' if right else 'WRONG'}  {question.document}: {question.text} -> {answer}")
    groups: dict[str, list[Mark]] = {}
    for question, mark in zip(questions, marks, strict=True):
        if not question.values:
            groups.setdefault("unanswerable", []).append(mark)
            continue
        is_closed = question.values[0].lower() in ("yes", "no")
        for name in ("answerable", "yes/no" if is_closed else "with a value", question.document):
            groups.setdefault(name, []).append(mark)
    first = [name for name in ("answerable", "with a value", "yes/no", "unanswerable") if name in groups]
    return {name: shares(groups[name]) for name in first + sorted(set(groups) - set(first))}
