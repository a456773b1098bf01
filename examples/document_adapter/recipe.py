"""The recipe of the document adapter: its data, and the call of `pitlane train MODEL FILES --lora`.

Run as `python -m document_adapter.recipe WORK`. WORK gets documents.jsonl, ordinary.jsonl, eval.jsonl and the folder `adapter`.
Files that exist are kept, and a killed training goes on: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bundled_model.docqa.generate import Settings, conversations
from bundled_model.docqa.phrases import SAYS
from document_adapter import ordinary, written
from pitlane.training import checkpoint
from pitlane.training.files import replacing

MODEL = "smollm2"
NUMBER = 270  # conversations about generated documents
ORDINARY = 100  # chats without a document
TIMES = 2  # conversations about each document written by hand
UNKNOWN_SHARE = 0.18  # of the questions about a generated document
# Shares of the document conversations, shortest and longest document in characters, and most questions.
LENGTHS = ((0.6, 300, 900, 6), (0.4, 900, 1800, 6))
TRAINING = (
    "--rank", "16", "--alpha", "32", "--targets", "all", "--answers-only", "--focus-weight", "3", "--length", "2048", "--rows", "1",
    "--lr", "7e-4", "--final-lr", "0.02", "--warmup", "0.05", "--epochs", "1", "--eval-every", "80", "--save-every", "10",
)  # fmt: skip


def documents(number: int, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield conversations about generated documents of all lengths, with plain answers: the value and its page."""
    for share, shortest, longest, turns in LENGTHS:
        settings = Settings(
            split,
            f"document_adapter:{longest}",
            shortest,
            longest,
            turns,
            unique_share=0.5,
            unknown_share=UNKNOWN_SHARE,
            chat_share=0.0,  # the generator's small talk is that of the bundled model
        )
        for row in conversations(settings, round(share * number)):
            for message in row["messages"]:
                message["content"] = message["content"].removeprefix(f"{SAYS} ")
            yield row


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSON lines, unless the file exists."""
    if not path.is_file():
        with replacing(path, str(path), "make room") as part, part.open("w", encoding="utf-8") as lines:
            for row in rows:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_data(work: Path, model: str = MODEL, number: int = NUMBER, device: str = "cpu") -> list[Path]:
    """Write the data; return the files to train on."""
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = written.split(written.read())
    write(work / "eval.jsonl", written.chats(held_out, 1))
    talk = round(ORDINARY * number / NUMBER)
    return [
        write(work / "written.jsonl", written.chats(train, TIMES)),
        write(work / "documents.jsonl", documents(number)),
        write(work / "ordinary.jsonl", ordinary.chats(model, talk, device=device)),
    ]


def command(work: Path, files: list[Path], model: str = MODEL, device: str = "cpu") -> list[str]:
    """Return the arguments of `pitlane` that train the adapter, or go on with a killed training."""
    out = work / "adapter"
    resume = ["--resume"] if (out / checkpoint.FILE).is_file() else []
    data = [*map(str, files), "--eval", str(work / "eval.jsonl")]
    return ["train", model, *data, "--lora", "--out", str(out), "--device", device, *TRAINING, *resume]


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        description="Train an adapter with which a chat model answers questions about a document."
    )
    parser.add_argument("work", type=Path, help="folder for the data and the adapter")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--number", type=int, default=NUMBER, help="conversations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--data-only", action="store_true", help="write the data, and print the command of the training"
    )
    arguments = parser.parse_args()
    files = write_data(arguments.work, arguments.model, arguments.number, arguments.device)
    pitlane = shutil.which("pitlane") or str(Path(sys.executable).with_name("pitlane"))
    call = [pitlane, *command(arguments.work, files, arguments.model, arguments.device)]
    if arguments.data_only:
        print(" ".join(["pitlane", *call[1:]]))
    else:
        sys.exit(subprocess.run(call, check=False).returncode)


if __name__ == "__main__":
    main()
