"""`pitlane train`: train a new Llama, or fine-tune a model of its family, on texts and chats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pitlane.ui.commands.training import PATH, POSITIVE, Job, layer_list, run_job, training_options

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
@click.option("--lora", is_flag=True, help="Train an adapter for MODEL: pitlane train MODEL FILES --lora.")
@click.option("--rank", type=SIZE, default=16, show_default=True, metavar="R", help="Of the adapter.")
@click.option(
    "--alpha", type=POSITIVE, default=32.0, show_default=True, metavar="A", help="Adapter's scale times rank."
)
@click.option("--targets", default="all", show_default=True, metavar="all|q,v", help="Linears: q,k,v,o,gate,up,down.")
@click.option("--from-adapter", type=PATH, metavar="DIR", help="Go on from this adapter, with other data or rates.")
@click.option("--exit-layers", metavar="N,N", help="Train exits after these layers too, for self-speculation.")
def train(
    job: Job,
    as_json: bool,
    start: Path | None,
    tokenizer: Path | None,
    vocab_size: int,
    exit_layers: str | None,
    lora: bool,
    rank: int,
    alpha: float,
    targets: str,
    from_adapter: Path | None,
    **shape: Any,
) -> None:
    """Train a model on FILES: .txt, or .jsonl with {"text"} or {"messages"} a line.

    With --lora, the first of FILES is the name of a model: it stays as it is, and an adapter for the plugin `lora` is trained.

    \b
    pitlane train book.txt --out mymodel
    pitlane train chats.jsonl --start mymodel --answers-only --out mychat
    pitlane train mymodel chats.jsonl --lora --rank 16 --answers-only --out myadapter
    """
    if lora:
        if exit_layers:
            raise click.UsageError("--exit-layers trains a model, and --lora trains an adapter; leave one of them out")
        _train_adapter(job, as_json, start, rank, alpha, targets, from_adapter)
        return
    if from_adapter:
        raise click.UsageError("--from-adapter goes on with an adapter; add --lora")
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


def _train_adapter(
    job: Job, as_json: bool, start: Path | None, rank: int, alpha: float, targets: str, first: Path | None
) -> None:
    """Train an adapter. Without `start`, the first file of the job is the name of the model."""
    from pitlane.models import folder_of
    from pitlane.training.lora import TARGETS, Adapter, train_adapter

    files = list(job.data.files)
    name = str(start or files.pop(0))
    if not files:
        raise click.UsageError("--lora needs a model and data: pitlane train MODEL FILES --lora --out FOLDER")
    adapter = Adapter(rank, alpha, tuple(TARGETS if targets == "all" else targets.split(",")))
    data, folder = replace(job.data, files=files), folder_of(name)
    run_job(
        lambda report: train_adapter(name, folder, data, adapter, job.settings, job.output, report, first),
        job,
        as_json,
        f"--model {name} --plugins +lora -o lora.adapter={job.output.folder}",
    )
