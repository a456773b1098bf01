"""The recipe of the bundled model: the data of every stage, and its training with pitlane.training.

Run as `python -m bundled_model.recipe WORK --text FILE ...`. A stage writes its data and its model to WORK/NAME and starts from
the model of the previous stage. A killed stage goes on, a finished stage is skipped. The model of the last stage is the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from bundled_model.copying import init_copying
from bundled_model.docqa import generate
from pitlane.training import checkpoint
from pitlane.training.corpus import Weighting, texts_of
from pitlane.training.files import replacing
from pitlane.training.loop import Progress, Settings
from pitlane.training.losses import LabelLoss
from pitlane.training.models import Shape, build, read_model, read_tokenizer, take_layers, write_model
from pitlane.training.tokenizer import PAGE, SPECIAL_TOKENS, save_tokenizer, train_tokenizer
from pitlane.training.train import DTYPES, Data, Output, train

VOCAB_SIZE = 4096
SHAPE = Shape(hidden_size=256, intermediate_size=640, num_layers=4, rope_theta=1e8)
WEIGHTING = Weighting(prompt=0.02, focus=4.0, prompt_sample=0.15)
TEXT_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of training.

    layers: the layers of the previous model that this stage starts with (models.take_layers); None: a new model. length: tokens
    per row. chars: shortest and longest document. unique, unknown: shares of the generator's settings. recall, text: shares of
    examples of random tokens and of plain text.
    """

    name: str
    layers: tuple[int, ...] | None
    tokens: float
    length: int
    chars: tuple[int, int]
    turns: int
    lr: float
    final_lr: float
    warmup: float = 0.03
    unique: float = 0.5
    recall: float = 0.02
    text: float = 0.08
    unknown: float = 0.2
    exit_layers: tuple[int, ...] = ()
    batch_tokens: int = 8192

    @property
    def rows(self) -> int:
        return self.batch_tokens // self.length

    @property
    def steps(self) -> int:
        return round(self.tokens / self.batch_tokens)

    @property
    def shards(self) -> int:
        """Number of files of about four million tokens; they are made and read in parallel."""
        return max(1, round(self.tokens / 4e6))

    def documents(self, split: str, shard: int = 0) -> generate.Settings:
        """Return the settings of the generator."""
        return generate.Settings(split, f"{self.name}:{shard}", *self.chars, self.turns, self.unique, self.unknown)


STAGES = (
    Stage("short", None, 17e6, 512, (120, 900), 14, 1.5e-3, 0.5, recall=0.05, unknown=0.12),
    Stage("long", (0, 1, 2, 3), 22e6, 512, (120, 1100), 14, 1.2e-3, 0.65, warmup=0.02),
    Stage(
        "grown",
        (0, 1, 2, 3, 3, 3, 3, 3),
        6e6,
        1024,
        (150, 2600),
        16,
        1e-3,
        0.02,
        text=0.15,
        unknown=0.3,
        exit_layers=(4,),
    ),
)


def scaled(stage: Stage, scale: float) -> Stage:
    """Return the stage with `scale` times the tokens, in batches that grow with the square root of `scale`."""
    return replace(stage, tokens=scale * stage.tokens, batch_tokens=max(1, round(scale**0.5)) * stage.batch_tokens)


def recall(rng: Random, length: int) -> dict[str, Any]:
    """Return an example of repeated runs of random tokens, in random order: only copying predicts the repeats."""
    pool = [rng.choices(range(len(SPECIAL_TOKENS), VOCAB_SIZE), k=rng.randint(3, 12)) for _ in range(length // 30)]
    ids: list[int] = []
    weights: list[float] = []
    seen = set()
    while len(ids) < length:
        choice = rng.randrange(len(pool))
        ids += pool[choice]
        weights += [0.0] + [float(choice in seen)] * (len(pool[choice]) - 1)
        seen.add(choice)
    return {"ids": ids[:length], "weights": weights[:length]}


def records(stage: Stage, texts: Sequence[str], shard: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the examples of a shard, for about 1.2 times its tokens, so that training sees few examples twice."""
    rng = Random(f"{stage.name}:{shard}")
    chats = generate.conversations(stage.documents("train", shard), sys.maxsize)
    total = 0
    while total < 1.2 * stage.tokens / stage.shards:
        kind = rng.random()
        if kind < stage.recall:
            yield recall(rng, min(stage.length, 512))
            total += min(stage.length, 512)
        elif texts and kind < stage.recall + stage.text:
            text = rng.choices(texts, weights=[len(text) for text in texts])[0]
            start = rng.randrange(max(1, len(text) - 3 * stage.length))
            yield {"text": text[start : start + 3 * stage.length], "weight": TEXT_WEIGHT}
            total += stage.length
        else:
            chat = next(chats)
            yield chat
            total += sum(len(message["content"]) for message in chat["messages"]) // 3


def _write(path: Path, examples: Iterable[dict[str, Any]]) -> Path:
    with replacing(path, str(path), "make room") as part, part.open("w", encoding="utf-8") as lines:
        for example in examples:
            lines.write(json.dumps(example, ensure_ascii=False) + "\n")
    return path


def write_shard(path: Path, stage: Stage, texts: Sequence[str]) -> Path:
    """Write a shard of a stage's data, unless the file exists. Its number is the end of the file name."""
    return path if path.is_file() else _write(path, records(stage, texts, int(path.stem.rpartition("-")[2])))


def _start(stage: Stage, before: Path, folder: Path, texts: list[str]) -> Path:
    """Write the model that a stage starts from, unless it exists; return its folder."""
    start = folder / "start"
    if (start / "model.safetensors").is_file():
        return start
    if stage.layers is None:
        start.mkdir(parents=True, exist_ok=True)
        sample = Stage("tokenizer", None, 2e6, 512, (200, 1500), 8, 0.0, 0.0, text=0.0, recall=0.0)
        lines = [*texts_of(records(sample, [])), *(line for text in texts for line in text[:600_000].split("\n"))]
        save_tokenizer(train_tokenizer(lines, VOCAB_SIZE), start, SHAPE.context)
        tokenizer = read_tokenizer(start)
        model = build(SHAPE, tokenizer, seed=1)
        init_copying(model, tokenizer.convert_tokens_to_ids(PAGE))
        write_model(model, start, start, DTYPES["float32"])
    else:
        write_model(take_layers(read_model(before), stage.layers), before, start, DTYPES["float32"])
    return start


def run_stage(stage: Stage, before: Path, folder: Path, texts: list[str], device: str, compile: bool = False) -> None:
    """Train a stage, or go on with a killed run of it."""
    folder.mkdir(parents=True, exist_ok=True)
    start = _start(stage, before, folder, texts)
    paths = [folder / f"data-{shard:03d}.jsonl" for shard in range(stage.shards)]
    write = partial(write_shard, stage=stage, texts=texts)
    if len(paths) == 1:
        write(paths[0])
    else:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(write, paths))
    _write(folder / "eval.jsonl", generate.conversations(stage.documents("phrasing"), 64))
    settings = Settings(
        steps=stage.steps, rows=stage.rows, lr=stage.lr, embedding_lr=stage.lr / 3, final_lr=stage.final_lr, warmup=stage.warmup,
        optimizer="muon", weight_decay=0.02, eval_every=100, save_every=100, compile=compile,
    )  # fmt: skip
    output = Output(folder / "model", "float32", device, resume=(folder / "model" / checkpoint.FILE).is_file())
    corpus = Data(paths, stage.length, WEIGHTING, eval_files=[folder / "eval.jsonl"])
    train(corpus, settings, output, _report, start, loss=LabelLoss(stage.exit_layers))
    (folder / "done").touch()


def _report(progress: Progress) -> None:
    if progress.eval_loss is not None:
        print(progress, file=sys.stderr, flush=True)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Make Pitlane's bundled model.")
    parser.add_argument("work", type=Path, help="folder for data and models of all stages")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="plain-text files to mix in")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the model first; needs a C++ compiler")
    parser.add_argument("--scale", type=float, default=1.0, help="train on SCALE times the tokens, in larger batches")
    arguments = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    before = arguments.work
    for stage in (scaled(stage, arguments.scale) for stage in STAGES):
        folder = arguments.work / stage.name
        if not (folder / "done").is_file():
            run_stage(stage, before, folder, texts, arguments.device, arguments.compile)
        before = folder / "model"


if __name__ == "__main__":
    main()
