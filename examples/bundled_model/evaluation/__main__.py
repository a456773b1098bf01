"""Measure a model, and a drafter for it, on the named sets: a table for every set, then one line of JSON.

Run as `python -m bundled_model.evaluation MODEL --handwritten FOLDER --squad FILE --text FILE ... --drafter FOLDER`. The
generated documents and the open prompts need no file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from bundled_model.docqa.domains import SPLITS
from bundled_model.evaluation import drafter, generated, handwritten, squad, text
from bundled_model.evaluation.answering import Answerer
from bundled_model.evaluation.generated import Question
from bundled_model.evaluation.measures import Rows

DRAFT_PROMPTS = 64  # windows of each text
DRAFT_PROMPT_TOKENS = 64  # length of the beginning of a window; the target continues it
NEW_TOKENS = 64


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bundled_model.evaluation", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument(
        "--splits",
        nargs="*",
        choices=SPLITS,
        default=generated.HELD_OUT,
        help="generator's splits to draw from, or none",
    )
    parser.add_argument(
        "--chars", type=int, nargs=2, default=(200, 1000), metavar=("MIN", "MAX"), help="length of their documents"
    )
    parser.add_argument("--turns", type=int, default=4, help="their questions about a document, at most")
    parser.add_argument("--generated", type=Path, nargs="+", default=[], help="conversations of the generator, JSONL")
    parser.add_argument("--handwritten", type=Path, help="folder of texts with questions.json")
    parser.add_argument(
        "--sample", type=Path, nargs=2, metavar=("FILE", "QUESTIONS"), help="one text or PDF and its questions, JSON"
    )
    parser.add_argument("--squad", type=Path, help="questions in SQuAD's format")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="held-out plain text")
    parser.add_argument("--drafter", type=Path, help="folder of a drafter with the same tokenizer")
    parser.add_argument("--draft-tokens", type=int, default=drafter.NUM_DRAFT_TOKENS, help="tokens drafted in a step")
    parser.add_argument("--number", type=int, default=200, help="questions of each split and file; 0 for none")
    parser.add_argument("--open", type=int, default=100, help="open prompts, at most 100; 0 for none")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than 1 helps only on idle cores")
    parser.add_argument("--show", action="store_true", help="print questions and answers")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(arguments)


def sections(arguments: argparse.Namespace) -> dict[str, Callable[[Answerer], Rows]]:
    """Return the measurements that the command line asks for, by name."""
    show = arguments.show and not arguments.json
    measures: dict[str, Callable[[Answerer], Rows]] = {}
    asked = generated_questions(arguments)
    if any(asked.values()):
        measures["generated"] = lambda model: measure_generated(model, asked, show)
    if arguments.handwritten:
        written = handwritten.read_questions(arguments.handwritten)
        measures["handwritten"] = lambda model: handwritten.measure(model, arguments.handwritten, written, show)
    if arguments.sample:
        measures["sample"] = lambda model: measure_sample(model, arguments.sample, show)
    if arguments.squad and arguments.number:
        measures["squad"] = lambda model: squad.measure(model, arguments.squad, arguments.number, show)
    if arguments.text:
        measures["text"] = lambda model: {path.name: text.perplexity(model, path) for path in arguments.text}
    if arguments.open:
        measures["open"] = lambda model: text.open_ended(model, arguments.open, show)
    if arguments.drafter:
        measures["drafter"] = lambda model: measure_drafter(model, asked, arguments)
    return measures


def generated_questions(arguments: argparse.Namespace) -> dict[str, list[Question]]:
    """Return the questions about generated documents, by the name of the split or file."""
    number = arguments.number
    shortest, longest = arguments.chars
    drawn = {
        split: generated.draw_conversations(split, number, shortest, longest, arguments.turns)
        for split in arguments.splits
    }
    read = {path.stem: generated.read_conversations(path) for path in arguments.generated}
    return {name: generated.sample(rows, number) for name, rows in (drawn | read).items()}


def measure_generated(model: Answerer, asked: dict[str, list[Question]], show: bool) -> Rows:
    """Measure each split and file."""
    rows: Rows = {}
    for name, questions in asked.items():
        rows |= generated.measure(model, name, questions, show)
    return rows


def measure_sample(model: Answerer, sample: Sequence[Path], show: bool) -> Rows:
    """Measure a single document with its questions."""
    document, questions = sample
    rows = json.loads(questions.read_text(encoding="utf-8"))
    asked = [handwritten.question_of(row, document.name) for row in rows]
    return handwritten.measure(model, document.parent, asked, show)


def measure_drafter(target: Answerer, asked: dict[str, list[Question]], arguments: argparse.Namespace) -> Rows:
    """Count accepted drafts on the document questions and plain texts that the command line names."""
    small = Answerer(arguments.drafter)
    if small.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise SystemExit(
            f"{arguments.drafter}: a drafter must have the model's own tokenizer; give one trained with it"
        )
    prompts = {name: [target.encode_chat(question.chat) for question in part] for name, part in asked.items()}
    if arguments.handwritten:
        chats = handwritten.chats(arguments.handwritten, handwritten.read_questions(arguments.handwritten))
        prompts["handwritten"] = [target.encode_chat(chat) for chat in chats]
    for path in arguments.text:
        windows = text.windows(target, path, DRAFT_PROMPTS)
        prompts[path.name] = [target.encode("") + window[:DRAFT_PROMPT_TOKENS] for window in windows]
    return {
        name: drafter.measure(target, small, part, NEW_TOKENS, arguments.draft_tokens) for name, part in prompts.items()
    }


def show_table(name: str, rows: Rows) -> None:
    """Print rows of numbers under the names of their columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    first = max(map(len, [name, *rows]))
    print(f"\n{name:<{first}}  " + "  ".join(f"{column:>10}" for column in columns))
    for title, row in rows.items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        widths = [max(len(column), 10) for column in columns]
        print(f"{title:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def main(command_line: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse(command_line)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    model = Answerer(arguments.model)
    report: dict[str, object] = {"model": arguments.model.resolve().name, "parameters": model.num_parameters}
    seconds: dict[str, float] = {}
    for name, measure in sections(arguments).items():
        start = time.monotonic()
        rows = measure(model)
        seconds[name] = round(time.monotonic() - start, 1)
        report[name] = rows
        if not arguments.json:
            show_table(name, rows)
    print(json.dumps(report | {"seconds": seconds}))


if __name__ == "__main__":
    main()
