"""`pitlane run`: one prompt to one answer, or a file of prompts to a file of answers.

Text streams to standard output; a line of stats follows on standard error.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from pitlane import MAX_SAMPLES, Result
from pitlane.storage.errors import StorageError
from pitlane.ui.commands.options import TEXT, answer_options, as_json, prompt_options, sampling_options
from pitlane.ui.document_plugins import default_note
from pitlane.ui.render import note, print_json, printable, progress, stats_line
from pitlane.ui.sampling import Sampling, seed_note
from pitlane.ui.session import Chat, EngineOptions, add_documents, read_answer

log = logging.getLogger(__name__)
INTERRUPTED = 130
FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@answer_options
@prompt_options
@sampling_options
@click.option("--samples", type=click.IntRange(1, MAX_SAMPLES), default=1, metavar="N", help="Number of answers.")
@click.option("--raw", is_flag=True, help="No chat template: the model continues the prompt. Greedy by default.")
@click.option(
    "--batch", type=EXISTING, metavar="FILE", help='Answer every line {"prompt": "..."} of FILE. Greedy by default.'
)
@click.option("--out", type=FILE, metavar="FILE", help="File for the answers of --batch, one line of JSON per answer.")
@as_json
@click.argument("prompt", type=TEXT, required=False)
@click.pass_context
def run(
    ctx: click.Context,
    options: EngineOptions,
    sampling: Sampling,
    doc: tuple[str, ...],
    system: str | None,
    think: bool | None,
    samples: int,
    raw: bool,
    batch: Path | None,
    out: Path | None,
    as_json: bool,
    prompt: str | None,
) -> None:
    """Answer one PROMPT, or all prompts of a file. `-`, or no PROMPT in a pipe, reads it from standard input.

    \b
    pitlane run --doc report.pdf "What were the findings?"
    pitlane run --plugins +prompt_lookup --json "Say it again: one, two, three" | jq .stats
    pitlane run --batch prompts.jsonl --out answers.jsonl   # a second run continues a killed one
    """
    from pitlane.ui.commands.model_choice import choose

    sampling = sampling.changed(n=samples)
    if (batch is None) != (out is None) or (batch is not None and prompt is not None):
        raise click.UsageError("--batch FILE and --out FILE go together, without a PROMPT")
    if batch is not None and out is not None:
        from pitlane.ui.commands.batch import BatchRun

        options = choose(options, asks=True)
        ctx.exit(BatchRun(options, sampling.greedy(), doc, (system, think, raw)).run(batch, out, as_json))
    text = read_prompt(prompt)
    documents = add_documents(doc, options.plugins_dir)
    options = choose(options, asks=True)
    with options.build(documents=bool(documents) and not raw) as engine:
        chat = Chat(engine.tokenizer, system, think, raw)
        for document in documents:
            chat.add(*document)
        params = sampling.params(engine.loader.source.sampling, is_chat=not (raw or chat.documents))
        asked = chat.ask(text)
        with engine.submit(asked, params) as stream, progress("Reading the prompt", chat.place(asked)) as advance:

            def on_text(piece: str) -> None:
                if piece and not as_json and samples == 1:
                    click.echo(printable(piece), nl=False)

            result = read_answer(stream, on_text, advance)
        drafter = next((plugin.name for plugin in engine.default_plan.plugins if plugin.role == "drafter"), None)
        about_plugins = default_note(engine) if documents and not as_json else ""
    _report(result, as_json, drafter, seed_note(params, result.stats["seed"]))
    if about_plugins:
        note(about_plugins)
    _remember(result)
    if result.finish_reason == "aborted":
        ctx.exit(INTERRUPTED)


def read_prompt(prompt: str | None) -> str:
    """The prompt from the argument; from standard input for `-` and in a pipe."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("give a PROMPT, or - to type it")
    if prompt is None or prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\r\n")
    if not prompt.strip():
        raise click.UsageError("the prompt is empty; write something")
    return prompt


def _remember(result: Result) -> None:
    """Store the lap times, not the text, for `bench history`; warn if the data folder cannot be written."""
    from pitlane.storage.db import Store

    try:
        with Store() as store:
            store.runs.add(result.stats)
    except StorageError as error:
        log.warning("the lap times of this answer are not kept: %s", error)


def _report(result: Result, as_json: bool, drafter: str | None, ending: str) -> None:
    if as_json:
        print_json(result.to_json())
        return
    for number, sample in enumerate(result.samples, 1):
        click.echo(f"--- {number}\n{printable(sample.text)}")
    if not result.samples and not result.text.endswith("\n"):
        click.echo()
    note(stats_line(result.stats, drafter) + ending)
