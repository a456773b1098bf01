"""Shared parts of `pitlane train` and `pitlane distill`: options of data, settings and output, and the progress line."""

from __future__ import annotations

import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from pitlane.ui.commands.options import THREADS, TOKENS, as_json
from pitlane.ui.render import note, print_json, say

if TYPE_CHECKING:
    from pitlane.training.loop import Progress, Report, Settings
    from pitlane.training.train import Data, Output

PATH = click.Path(path_type=Path)


class Finite(click.FloatRange):
    """A finite number in a range: `nan` and `inf` are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


PRODUCTS = ("auto", "bfloat16", "float32")
SHARE, POSITIVE = Finite(0, 1), Finite(0, min_open=True)

OPTIONS = (
    click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE..."),
    click.option("--out", type=PATH, required=True, metavar="DIR", help="Folder for model, state and loss curve."),
    click.option("--resume", is_flag=True, help="Go on where a killed run saved last."),
    click.option("--length", type=TOKENS, default=512, show_default=True, metavar="N", help="Tokens a row."),
    click.option("--answers-only", is_flag=True, help="Learn the assistant's answers of chats alone."),
    click.option("--focus-weight", type=POSITIVE, default=1.0, show_default=True, metavar="W", help="Weight of `focus`."),
    click.option("--eval", "eval_files", multiple=True, type=PATH, metavar="FILE", help="Held-out files.  [default: a share]"),
    click.option("--eval-share", type=SHARE, default=0.02, show_default=True, metavar="P", help="Share of rows held out."),
    click.option("--steps", type=click.IntRange(1), metavar="N", help="Updates.  [default: from --epochs]"),
    click.option("--epochs", type=POSITIVE, default=1.0, show_default=True, metavar="N", help="Times each row is seen."),
    click.option("--rows", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Rows a batch."),
    click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Batches an update."),
    click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True),
    click.option("--lr", type=POSITIVE, default=1e-3, show_default=True, metavar="R", help="Peak learning rate."),
    click.option("--embedding-lr", type=POSITIVE, metavar="R", help="That of embeddings and norms.  [default: --lr]"),
    click.option("--final-lr", type=SHARE, default=0.1, show_default=True, metavar="P", help="Share of it at the end."),
    click.option("--warmup", type=SHARE, default=0.03, show_default=True, metavar="P", help="Share of the steps."),
    click.option("--weight-decay", type=Finite(0), default=0.01, show_default=True, metavar="R"),
    click.option("--clip", type=POSITIVE, default=1.0, show_default=True, metavar="N", help="Greatest norm of gradients."),
    click.option("--eval-every", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Steps."),
    click.option("--save-every", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Steps."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="S"),
    click.option("--compile", is_flag=True, help="Fuse the steps first: a minute, needs a C++ compiler."),
    click.option("--recompute", is_flag=True, help="Compute layers twice: less memory, more time."),
    click.option("--products", type=click.Choice(PRODUCTS), default="auto", show_default=True, help="auto: the faster."),
    click.option("--qat", type=click.Choice(["int3", "int4", "int8"]), help="Train with rounded weights, and write them too."),
    click.option("--qat-group-size", type=click.Choice([32, 64, 128]), default=64, show_default=True, help="Of int3 and int4."),
    click.option("--save-dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True),
    click.option("--device", metavar="D", help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: all cores]"),
)  # fmt: skip


class Job(NamedTuple):
    """The values of the shared options."""

    data: Data
    settings: Settings
    output: Output


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options. The command receives them as `job: Job`, beside `as_json`."""

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        return command(*args, job=_job(values), **values)

    for option in reversed(OPTIONS):
        gathered = option(gathered)
    return as_json(gathered)


def _job(values: dict[str, Any]) -> Job:
    """Take the shared options out of the values."""
    import torch

    from pitlane.models import choose_device
    from pitlane.training.corpus import Weighting
    from pitlane.training.loop import Settings
    from pitlane.training.train import Data, Output

    threads = values.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    prompt_weight = 0.0 if values.pop("answers_only") else 1.0
    data = Data(
        files=values.pop("files"),
        length=values.pop("length"),
        weighting=Weighting(prompt_weight, values.pop("focus_weight")),
        eval_share=values.pop("eval_share"),
        eval_files=values.pop("eval_files"),
    )
    device = choose_device(values.pop("device"))
    output = Output(values.pop("out"), values.pop("save_dtype"), str(device), values.pop("resume"))
    settings = Settings(**{name: values.pop(name) for name in Settings.__dataclass_fields__})
    return Job(data, settings, output)


def run_job(train: Callable[[Report], Progress], job: Job, as_json: bool, flags: str = "") -> None:
    """Train under a progress line, then print the result.

    flags: the flags of `pitlane chat` that serve the result; '': the result is a model in the output folder.
    """
    from pitlane.training.memory import peak_bytes

    with _progress_line() as report, _ending_between_steps(report) as stoppable:
        last = train(stoppable)
    peak = peak_bytes(job.output.device)
    if peak is not None:
        note(f"peak memory {peak / 2**30:.2f} GiB")
    result = asdict(last) | {"model": str(job.output.folder)}
    if as_json:
        print_json(result)
        return
    right = f", {last.right:.1%} of the tokens right" if last.right is not None else ""
    note(f"held-out loss {last.eval_loss:.4f}{right}")
    say(f"{job.output.folder}: try it with  pitlane chat {flags or f'--model {job.output.folder}'}")


def layer_list(text: str) -> tuple[int, ...]:
    """Read `0,3,7`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layer numbers; write 0,3,7") from None


@contextmanager
def _ending_between_steps(report: Report) -> Iterator[Report]:
    """Let Ctrl-C end the run after the current step, with its state saved; at once before the first step or the second time."""
    is_stepping = is_asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal is_asked
        if is_asked or not is_stepping:
            raise KeyboardInterrupt
        is_asked = True

    def stoppable(progress: Progress) -> None:
        nonlocal is_stepping
        is_stepping = True
        report(progress)
        if is_asked:
            note(f"stopped after step {progress.step} of {progress.steps}, which is saved; go on with --resume")
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stoppable
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress_line() -> Iterator[Report]:
    """Yield a report that draws a bar on standard error; without a terminal, it prints a line per evaluation."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading the data", total=None)
        held_out = ""

        def report(progress: Progress) -> None:
            nonlocal held_out
            if progress.eval_loss is not None:
                held_out = f" (held out {progress.eval_loss:.3f})"
            words = f"loss {progress.loss:.3f}{held_out}, {progress.tokens_per_second:,.0f} tok/s"
            bar.update(task, completed=progress.step, total=progress.steps, description=words)

        yield report


def _line(progress: Progress) -> None:
    if progress.eval_loss is not None:
        left = (progress.steps - progress.step) * progress.step_tokens / progress.tokens_per_second
        note(
            f"step {progress.step}/{progress.steps}: loss {progress.loss:.4f}, held out {progress.eval_loss:.4f}, "
            f"{progress.tokens_per_second:,.0f} tok/s, {left:.0f} s left"
        )
