"""`pitlane distill`: train a small model to imitate a large model, so that it can draft for it."""

from __future__ import annotations

from pathlib import Path

import click

from pitlane.ui.commands.training import POSITIVE, SHARE, Job, layer_list, run_job, training_options

LAYERS = "layers:"


@click.command()
@click.argument("teacher")
@click.argument("student")
@training_options
@click.option("--method", type=click.Choice(["kd", "sequence", "on-policy"]), default="kd", show_default=True)
@click.option("--temperature", type=POSITIVE, default=2.0, show_default=True, metavar="T", help="Of kd.")
@click.option(
    "--hard", type=SHARE, default=0.1, show_default=True, metavar="W", help="Weight of the data's own labels."
)
@click.option(
    "--beta",
    type=SHARE,
    default=1.0,
    show_default=True,
    metavar="B",
    help="on-policy: 0 forward, 1 reverse KL, else JSD.",
)
@click.option(
    "--sampled-tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    metavar="N",
    help="on-policy: per prompt.",
)
def distill(
    job: Job,
    as_json: bool,
    teacher: str,
    student: str,
    method: str,
    temperature: float,
    hard: float,
    beta: float,
    sampled_tokens: int,
) -> None:
    """Teach the model in folder STUDENT what the model TEACHER says about FILES.

    TEACHER is the name of a model, as in `pitlane run --model`. STUDENT is a
    folder, or `layers:0,7`: a new model of these layers of the teacher. Both
    must have one tokenizer.

    \b
    pitlane distill mymodel layers:0 chats.jsonl --out mydrafter
    pitlane distill mymodel mydrafter chats.jsonl --method on-policy --out better
    """
    from pitlane.models import folder_of
    from pitlane.training import distill as distilling

    pupil = layer_list(student.removeprefix(LAYERS)) if student.startswith(LAYERS) else Path(student)
    folder = folder_of(teacher)
    how = distilling.Method(method, temperature, hard, beta, sampled_tokens)
    run_job(
        lambda report: distilling.distill(folder, pupil, job.data, how, job.settings, job.output, report), job, as_json
    )
