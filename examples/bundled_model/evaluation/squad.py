"""SQuAD questions: exact match and F1 (Rajpurkar et al. 2016), and how often the answer contains a gold answer.

Each paragraph is a document of one page. The model answers in sentences, so exact match is low by nature. `contains` is the share
of normalised answers that contain a normalised gold answer in whole words. Citations and the final full stop are removed first.
Questions marked impossible are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from bundled_model.evaluation.answering import Answerer, Message
from bundled_model.evaluation.handwritten import document_message
from bundled_model.evaluation.measures import Rows, f1, is_refusal, normalised, without_citations

SEED = 1


class Question(NamedTuple):
    """A question about a paragraph, and all accepted answers."""

    title: str
    context: str
    text: str
    golds: tuple[str, ...]


def read(path: Path) -> list[Question]:
    """Read all answerable questions of a file in SQuAD's format."""
    return [
        Question(
            article["title"], paragraph["context"], row["question"], tuple(gold["text"] for gold in row["answers"])
        )
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for row in paragraph["qas"]
        if row["answers"] and not row.get("is_impossible", False)
    ]


def chat(question: Question) -> list[Message]:
    """Return the chat that asks the question."""
    return [document_message(question.title, [question.context]), {"role": "user", "content": question.text}]


def score(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return exact match, F1 and `contains`: the best over the gold answers of a question, the mean over questions."""
    exact = overlap = contained = 0.0
    for answer, accepted in zip(answers, golds, strict=True):
        bare = without_citations(answer)
        exact += max(normalised(bare) == normalised(gold) for gold in accepted)
        overlap += max(f1(bare, gold) for gold in accepted)
        contained += max(f" {normalised(gold)} " in f" {normalised(bare)} " for gold in accepted)
    return {"exact": exact / len(answers), "f1": overlap / len(answers), "contains": contained / len(answers)}


def measure(answerer: Answerer, path: Path, number: int, show: bool = False) -> Rows:
    """Ask a seeded sample of `number` questions."""
    questions = read(path)
    questions = Random(SEED).sample(questions, min(number, len(questions)))
    answers = answerer.answer([chat(question) for question in questions])
    if show:
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question.text} ({question.golds[0]}) -> {answer}")
    refused = sum(map(is_refusal, answers)) / len(answers)
    scores = score(answers, [question.golds for question in questions])
    return {path.name: {"questions": len(questions)} | scores | {"refused": refused}}
