"""`pitlane eval`: bytes, speed and quality of a model under several methods: a table, a plot, and one JSON document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pitlane.storage.errors import PitlaneError
from pitlane.ui.commands.options import as_json, engine_options
from pitlane.ui.render import note, print_json, print_table, progress, say, size
from pitlane.ui.session import EngineOptions

if TYPE_CHECKING:
    from pitlane import Engine
    from pitlane.ui.bench.quality import Quality

HEADERS = ["method", "perplexity", "KL", "moved", "same top token", "weights", "tok/s", "ready after"]


@click.command(name="eval")
@engine_options
@click.option(
    "--method",
    "-M",
    "methods",
    multiple=True,
    metavar="METHOD",
    help="plugin:key=value,key=value+plugin, on top of the default set. Repeatable; '' measures that set alone.  "
    "[default: int8, int4, awq, gptq, mixed]",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 text to measure on.  [default: the sample PDF]",
)
@click.option("--skip", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Characters to skip.")
@click.option("--tokens", type=click.IntRange(16), default=2048, show_default=True, metavar="N", help="At most.")
@click.option(
    "--window",
    type=click.IntRange(16),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of context: the text is cut into such pieces.",
)
@click.option(
    "--questions",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE.json",
    help='Also ask document questions: a list of {"question", "answer"}, with "document": a file.',
)
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw bytes, speed and quality.")
@as_json
@click.argument("name", metavar="[MODEL]", required=False)
def eval_(
    options: EngineOptions,
    methods: tuple[str, ...],
    text: str | None,
    skip: int,
    tokens: int,
    window: int,
    questions: str | None,
    plot: str | None,
    as_json: bool,
    name: str | None,
) -> None:
    """Measure bytes, speed and quality of MODEL under several methods.

    The first row is the default set, without rounding; KL, moved and same top token compare with it. The last line of the output is
    a JSON document.

    \b
    pitlane eval smollm2 -M int4:group_size=64,symmetric=true+awq -M gptq:bits=3
    """
    from pitlane.ui.bench.machine import commit, machine, versions
    from pitlane.ui.bench.quality import DEFAULT_METHODS, check_method, measure, read_questions
    from pitlane.ui.bench.quality import plot as draw
    from pitlane.ui.commands.model_choice import fetch

    options = replace(options, model=name) if name else options
    if plot and not Path(plot).resolve().parent.is_dir():
        raise click.BadParameter(f"no such folder: {Path(plot).parent}", param_hint="--plot")
    fetch(options.model, options.plugins_dir)
    chosen = DEFAULT_METHODS if not methods else tuple(method for method in methods if method.strip())
    asked = read_questions(Path(questions)) if questions else []
    with options.build() as engine:
        ids = _tokens(engine, text, skip, tokens)
        window = min(window, engine.loader.context - 1)
        for method in chosen:
            check_method(engine, method)
        if not methods:
            chosen = _serving(engine, chosen)
        with progress("Measuring") as advance:
            results = measure(engine, ids, chosen, window, advance, asked)
        report: dict[str, Any] = engine.loader.describe() | {
            "text": text or "sample PDF",
            "skip": skip,
            "tokens": len(ids),
            "window": window,
            "questions": len(asked),
            "methods": [result.to_json() for result in results],
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }
    if plot:
        draw(results, Path(plot), f"{report['model']}, {len(ids)} tokens of {Path(report['text']).name}")
    if as_json:
        print_json(report)
        return
    headers = [*HEADERS, f"right of {len(asked)}"] if asked else HEADERS
    print_table(
        headers, [_row(result) for result in results], f"{report['model']}, {report['dtype']}, {len(ids)} tokens"
    )
    say(json.dumps(report))


def _serving(engine: Engine, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The default methods that can serve the model; a note says why a method is left out."""
    from pitlane.ui.bench.quality import method_settings

    serving = []
    for method in methods:
        try:
            engine.plan(method_settings(engine, method))
            serving.append(method)
        except PitlaneError as error:
            note(f"left out {method}: {error}")
    return tuple(serving)


def _tokens(engine: Engine, text: str | None, skip: int, count: int) -> list[int]:
    from importlib.resources import files

    from pitlane import load_document

    if text is None:
        pages = load_document(str(files("pitlane.storage.bundled") / "sample.pdf")).pages
        whole = "\n".join(page.text for page in pages)
    else:
        try:
            whole = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise click.BadParameter(f"{text} is not UTF-8 text", param_hint="--text") from None
    ids = engine.tokenizer.encode(whole[skip : skip + 64 * count], add_special_tokens=False)[:count]
    if len(ids) < 16:
        raise click.BadParameter(f"the text has {len(ids)} tokens; give at least 16", param_hint="--text")
    return ids


def _row(result: Quality) -> list[Any]:
    speed = "-" if result.tokens_per_second is None else f"{result.tokens_per_second:.1f}"
    is_first = result.method == "none"
    return [
        result.method,
        f"{result.perplexity:.3f}",
        "-" if is_first else f"{result.kl:.5f}",
        "-" if is_first else f"{100 * result.moved:.2f} %",
        "-" if is_first else f"{100 * result.top1:.1f} %",
        size(result.weight_bytes),
        speed,
        f"{result.prepare_seconds:.1f} s",
        *([] if result.questions_right is None else [result.questions_right]),
    ]
