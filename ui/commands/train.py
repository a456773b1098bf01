"""`pitlane train`: train a new Llama, or fine-tune a model of its family, on texts and chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pitlane.ui.commands.training import PATH, Job, layer_list, run_job, training_options

SIZE = click.IntRange(1)


@click.command()
@training_options
@click.option("--start", type=PATH, metavar="DIR", help="Fine-tune the model in this folder.  [default: a new model]")
@click.option("--tokenizer", type=PATH, metavar="DIR", help="Tokenizer of a new model.  [default: trained on the data]")
@click.option(
    "--vocab-size",
    type=click.IntRange(264),
    default=4096,
    show_default=True,
    metavar="N",
    help="Of a trained tokenizer.",
)
@click.option("--hidden-size", type=SIZE, default=256, show_default=True, metavar="N", help="Of a new model.")
@click.option("--intermediate-size", type=SIZE, default=640, show_default=True, metavar="N")
@click.option("--layers", "num_layers", type=SIZE, default=4, show_default=True, metavar="N")
@click.option("--kv-heads", "num_kv_heads", type=SIZE, default=2, show_default=True, metavar="N")
@click.option("--head-dim", type=SIZE, default=64, show_default=True, metavar="N")
@click.option("--context", type=SIZE, default=4096, show_default=True, metavar="N", help="Most tokens it is to read.")
@click.option("--exit-layers", metavar="N,N", help="Train exits after these layers too, for self-speculation.")
def train(
    job: Job,
    as_json: bool,
    start: Path | None,
    tokenizer: Path | None,
    vocab_size: int,
    exit_layers: str | None,
    **shape: Any,
) -> None:
    """Train a model on FILES: .txt, or .jsonl with {"text"} or {"messages"} a line.

    \b
    pitlane train book.txt --out mymodel
    pitlane train chats.jsonl --start mymodel --answers-only --out mychat
    """
    from pitlane.training import train as training
    from pitlane.training.losses import LabelLoss
    from pitlane.training.models import Shape

    exits = layer_list(exit_layers) if exit_layers else ()
    origin = start or Shape(**shape)
    tokenizer_or_size = tokenizer or vocab_size
    loss = LabelLoss(exits)
    run_job(
        lambda report: training.train(job.data, job.settings, job.output, report, origin, tokenizer_or_size, loss),
        job,
        as_json,
    )
