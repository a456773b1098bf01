"""Generated conversations that training did not see: whole answers, values, pages and refusals, by kind of question.

Before each question the model reads the right answers of the chat, not its own. Conversations come from the generator's held-out
splits, or from files with a JSON object per line: {"messages": [{"role", "content"}, ...]}. Messages of the assistant also hold
`kind` and, if the document answers, `focus` (the value). `exact` compares whole answers. Small talk has its own row. Knows nothing
of how documents are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from bundled_model.docqa.generate import Settings, conversations
from bundled_model.evaluation.answering import Answerer, Message
from bundled_model.evaluation.measures import (
    Mark,
    Rows,
    cited_pages,
    has_value,
    is_refusal,
    one_line,
    shares,
)

SEED = 1
HELD_OUT = ("values", "phrasing", "domain")
UNKNOWN_SHARE = 0.25


class Question(NamedTuple):
    """A chat up to a question, and the right answer to it."""

    chat: list[Message]
    gold: Message

    @property
    def unanswerable(self) -> bool:
        """Whether the right answer is the refusal."""
        return is_refusal(self.gold["content"])

    @property
    def groups(self) -> tuple[str, ...]:
        """The rows of the table in which the question counts."""
        kind: str = self.gold["kind"]
        return (kind,) if self.unanswerable or kind == "chat" else ("answerable", kind)


def read_conversations(path: Path) -> list[dict[str, Any]]:
    """Read a JSON object from each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def draw_conversations(split: str, number: int, min_chars: int, max_chars: int, turns: int) -> list[dict[str, Any]]:
    """Draw conversations of a split, with a seed that training does not use and more unanswerable questions than in training."""
    settings = Settings(
        split=split,
        seed="evaluation",
        min_chars=min_chars,
        max_chars=max_chars,
        turns=turns,
        unknown_share=UNKNOWN_SHARE,
    )
    return list(conversations(settings, number))


def questions_of(rows: Iterable[dict[str, Any]]) -> list[Question]:
    """Return a question for each message of the assistant that has a kind."""
    questions = []
    for conversation in rows:
        messages = conversation["messages"]
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("kind"):
                questions.append(Question(messages[:index], message))
    return questions


def sample(rows: Iterable[dict[str, Any]], number: int) -> list[Question]:
    """Return a seeded sample of at most `number` questions."""
    questions = questions_of(rows)
    return Random(SEED).sample(questions, min(number, len(questions)))


def judge(question: Question, answer: str) -> Mark:
    """Compare an answer with the right answer."""
    gold = question.gold
    refused = is_refusal(answer)
    exact = one_line(answer) == one_line(gold["content"])
    if question.unanswerable:
        return Mark(exact=exact, refused=refused)
    value = has_value([gold["focus"]], answer) if gold.get("focus") else None
    pages = cited_pages(gold["content"])
    return Mark(exact, value, cited_pages(answer) == pages if pages else None, refused)


def measure(answerer: Answerer, name: str, questions: Sequence[Question], show: bool = False) -> Rows:
    """Ask the questions. Rows: answerable, unanswerable, then the kinds."""
    answers = answerer.answer([question.chat for question in questions])
    groups: dict[str, list[Mark]] = {}
    for question, answer in zip(questions, answers, strict=True):
        mark = judge(question, answer)
        if show and not mark.exact:
            print(f"{name}: {question.chat[-1]['content']} ({question.gold['content']}) -> {answer}")
        for group in question.groups:
            groups.setdefault(group, []).append(mark)
    first = [group for group in ("answerable", "unanswerable") if group in groups]
    return {f"{name}: {group}": shares(groups[group]) for group in first + sorted(set(groups) - set(first))}
