"""Measure the bundled model: right values and pages on generated documents it has not seen, and on the sample PDF.

Run as `python -m pitlane.plugins.training.evaluate_bundled MODEL [--sample PDF --questions JSON]`. Greedy decoding through
transformers; every question is the first of its chat. Prints one JSON line per document set. Knows nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import NamedTuple

import pypdfium2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pitlane.plugins.training.docqa import document_message, make_document, make_turns
from pitlane.plugins.training.docqa_templates import UNKNOWN

SEED = 2 * 10**9
LENGTHS = (250, 600, 1200, 2000)


class Question(NamedTuple):
    """A question about a document message; an empty value means that the document does not say."""

    message: str
    text: str
    value: str
    page: int


def page_texts(path: Path) -> list[str]:
    """Return the text of each page as the engine's document loader gives it."""
    with pypdfium2.PdfDocument(path) as pdf:
        texts = [page.get_textpage().get_text_bounded() for page in pdf]
    return ["\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n")).strip() for text in texts]


def sample_questions(pdf: Path, questions: Path) -> list[Question]:
    """Read the questions about the sample document."""
    message = document_message(pdf.name, page_texts(pdf))
    rows = json.loads(questions.read_text(encoding="utf-8"))
    return [Question(message, row["question"], row["answer"], row["page"]) for row in rows]


def generated_questions(chars: int, number: int) -> list[Question]:
    """Ask one question about each of `number` new documents of about `chars` characters."""
    questions = []
    for index in range(number):
        rng = Random(SEED + index)
        document = make_document(rng, chars)
        turn = rng.choice(make_turns(rng, document, 4))
        value, page = (turn.fact.value, turn.fact.page) if turn.fact else ("", 0)
        questions.append(Question(document_message(document.title, document.pages), turn.question, value, page))
    return questions


class Answerer:
    """A model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answer(self, question: Question) -> str:
        """Answer greedily."""
        messages = [{"role": "system", "content": question.message}, {"role": "user", "content": question.text}]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = self.model.generate(**prompt, max_new_tokens=48, do_sample=False)
        text: str = self.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


def measure(answerer: Answerer, questions: list[Question], show: bool) -> dict[str, float]:
    """Count right values (the value stands in the answer), right pages, and right refusals, as shares."""
    asked = [question for question in questions if question.value]
    unknown = [question for question in questions if not question.value]
    values = pages = 0
    for question in asked:
        answer = answerer.answer(question)
        right = question.value in answer
        values += right
        pages += right and f"[p. {question.page}]" in answer
        if show:
            print(f"{'right' if right else 'wrong'}: {question.text} -> {answer}")
    refused = sum(answerer.answer(question) == UNKNOWN for question in unknown)
    result = {"questions": len(asked), "value": values / len(asked), "value_and_page": pages / len(asked)}
    return result | ({"unanswerable": len(unknown), "refused": refused / len(unknown)} if unknown else {})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure Pitlane's bundled model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--sample", type=Path, help="the sample PDF")
    parser.add_argument("--questions", type=Path, help="questions about it: JSON list of question, answer, page")
    parser.add_argument("--number", type=int, default=100, help="generated documents of each length")
    arguments = parser.parse_args()
    answerer = Answerer(arguments.model)
    if arguments.sample and arguments.questions:
        questions = sample_questions(arguments.sample, arguments.questions)
        print(json.dumps({"documents": arguments.sample.name} | measure(answerer, questions, show=True)))
    for chars in LENGTHS if arguments.number else ():
        result = measure(answerer, generated_questions(chars, arguments.number), show=False)
        print(json.dumps({"documents": f"generated, {chars} characters"} | result), flush=True)


if __name__ == "__main__":
    main()
