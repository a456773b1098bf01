"""`pitlane train` without its command line: train a model on files, and write it to a folder.

`fit` is shared with distill.py. Knows nothing of flags and of progress bars.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel as Model

from pitlane.training import checkpoint, curve
from pitlane.training.corpus import Encoder, Rows, Weighting, pack, read_records, texts_of
from pitlane.training.errors import TrainingError
from pitlane.training.loop import Progress, Report, Settings, Trainer
from pitlane.training.losses import LabelLoss, Loss
from pitlane.training.models import Shape, build, read_model, read_tokenizer, write_model
from pitlane.training.qat import fake_quantize, format_of, write_quantized
from pitlane.training.tokenizer import save_tokenizer, train_tokenizer

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PARALLEL_BYTES = 50_000_000  # with less data, starting processes takes longer than it saves
T = TypeVar("T")


def pack_file(path: Path, tokenizer: Path, weighting: Weighting, length: int, seed: int) -> Rows:
    """Encode and pack a file with the tokenizer of a folder."""
    reader = read_tokenizer(tokenizer)
    pad_id = next(id for id in (reader.pad_token_id, reader.eos_token_id, 0) if id is not None)
    return pack(Encoder(reader, weighting, seed).examples(read_records(path)), length, pad_id)


def in_processes(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Apply a function to files, in order; in processes if there are several files and much data."""
    large = sum(path.stat().st_size for path in paths if path.is_file()) > PARALLEL_BYTES
    workers = min(len(paths), os.cpu_count() or 1)
    if workers < 2 or not large:
        return [function(path) for path in paths]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, paths))


@dataclass(frozen=True, slots=True)
class Data:
    """What to train on. length: tokens per row.

    eval_share: share of the rows that is held out for evaluation, unless `eval_files` are given.
    """

    files: Sequence[Path]
    length: int = 512
    weighting: Weighting = field(default_factory=Weighting)
    eval_share: float = 0.02
    eval_files: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if self.length < 2:
            raise TrainingError(f"a row must have at least 2 tokens, got {self.length}; choose a larger --length")

    def rows(self, tokenizer_folder: Path, seed: int) -> tuple[Rows, Rows]:
        """Return the training rows and the evaluation rows."""
        pack_path = partial(
            pack_file, tokenizer=tokenizer_folder, weighting=self.weighting, length=self.length, seed=seed
        )
        rows = Rows.joined(in_processes(pack_path, self.files))
        if self.eval_files:
            return rows, Rows.joined(in_processes(pack_path, self.eval_files))
        if len(rows) < 2:
            raise TrainingError(
                f"the corpus makes {len(rows)} row of {self.length} tokens, and one is kept for evaluation; "
                "give more text, or a smaller --length"
            )
        return rows.split(self.eval_share, seed)


@dataclass(frozen=True, slots=True)
class Output:
    """Where to write and where to train. dtype: of the written model; resume: go on with the run in the folder."""

    folder: Path
    dtype: str = "bfloat16"
    device: str = "cpu"
    resume: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether there is a saved state to resume. A run that ended before its first save begins again."""
        return self.resume and (self.folder / checkpoint.FILE).is_file()

    def prepare(self) -> None:
        """Make the folder. Refuse to overwrite a run that can be resumed, or a model."""
        if self.resume and not self.folder.is_dir():
            raise TrainingError(f"nothing to resume: there is no folder {self.folder}; start without --resume")
        if not self.goes_on:
            if (self.folder / checkpoint.FILE).is_file():
                raise TrainingError(f"{self.folder} holds a run; go on with --resume, or choose another --out")
            for name, what in (("config.json", "a model"), ("adapter_config.json", "an adapter")):
                if (self.folder / name).is_file():
                    raise TrainingError(f"{self.folder} holds {what}; choose another --out")
            if self.resume:
                log.warning("%s holds no saved state yet: the run begins again at its first step", self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot make the folder {self.folder}: {error}; choose another --out") from None


def fit(
    model: Model,
    tokenizer_from: Path,
    data: Data,
    loss: Loss,
    settings: Settings,
    output: Output,
    report: Report,
    export: Callable[[Model], None] | None = None,
) -> Progress:
    """Train a model with a loss; write model, state and loss curve (JSON and PNG) to the output folder.

    export: writes the result of the training after each saved state. None: the whole model is written. With `settings.qat`, the
    quantized model is written too, at the end.
    """
    rows, held_out = data.rows(tokenizer_from, settings.seed)
    export = export or partial(
        write_model, tokenizer_from=tokenizer_from, folder=output.folder, dtype=DTYPES[output.dtype]
    )
    form = format_of(settings.qat, settings.qat_group_size) if settings.qat else None
    if form is not None:
        if settings.compile:
            raise TrainingError(
                "--qat rounds weights in every step, which --compile cannot fuse; leave one of them out"
            )
        fake_quantize(model, form, DTYPES[output.dtype])
    trainer = Trainer(model.to(output.device), rows, held_out, loss, settings, output.folder, export, report)
    if output.goes_on:
        trainer.resume()
    last = trainer.run()
    curve.draw(trainer.curve, output.folder)
    if form is not None:
        log.warning("%s holds the rounded weights", write_quantized(output.folder, form))
    return last


def train(
    data: Data,
    settings: Settings,
    output: Output,
    report: Report,
    start: Path | Shape,
    tokenizer: Path | int = 4096,
    loss: LabelLoss | None = None,
) -> Progress:
    """Train a model.

    start: a folder, whose model and tokenizer are used, or the shape of a new model. tokenizer: of a new model; a folder, or the
    vocabulary size of a tokenizer to train on the data.
    """
    output.prepare()
    if isinstance(start, Path):
        model, tokenizer_from = read_model(start), start
    else:
        tokenizer_from = (
            tokenizer if isinstance(tokenizer, Path) else _new_tokenizer(data, tokenizer, output, start.context)
        )
        model = build(start, read_tokenizer(tokenizer_from), settings.seed)
    loss, num_layers = loss or LabelLoss(), model.config.num_hidden_layers
    if not all(0 < layer < num_layers for layer in loss.exit_layers):
        raise TrainingError(
            f"exits after layers {list(loss.exit_layers)} of a model of {num_layers} layers; name some of 1 to {num_layers - 1}"
        )
    if loss.exit_layers:
        model.config.exit_layers = list(loss.exit_layers)
    return fit(model, tokenizer_from, data, loss, settings, output, report)


def _new_tokenizer(data: Data, vocab_size: int, output: Output, context: int) -> Path:
    """Train a tokenizer on the files and save it in the output folder; a resumed run keeps its tokenizer."""
    if not (output.goes_on and (output.folder / "tokenizer.json").is_file()):
        texts = texts_of(record for path in data.files for record in read_records(path))
        try:
            save_tokenizer(train_tokenizer(texts, vocab_size), output.folder, context)
        except OSError as error:
            raise TrainingError(f"cannot write the tokenizer to {output.folder}: {error}") from None
    return output.folder
