"""`pitlane compare`: one prompt under several plans, side by side; a table for people, JSON and CSV for programs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pitlane import BadOption
from pitlane.storage.errors import PitlaneError, StorageError
from pitlane.ui.commands.options import MOST, TEXT, answer_options, as_json, greedy_sampling_options, prompt_options
from pitlane.ui.render import note, print_json, print_table, progress, short_name, size
from pitlane.ui.sampling import Sampling
from pitlane.ui.session import Chat, EngineOptions, add_documents

if TYPE_CHECKING:
    from pitlane import Engine, Plan
    from pitlane.storage.types import StoredComparison

log = logging.getLogger(__name__)
PLANS = ("core", "default")
HEADERS = ("plan", "answer", "speed", "tok/s", "TTFT ms", "ms/token p50, p95", "accepted/step", "weights", "KV")


@click.command()
@answer_options
@prompt_options
@greedy_sampling_options
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="SET",
    help="A plan: core, default, or a set as in --plugins; options may follow: "
    "'+a a.key=value'. Repeatable; the first is compared with.  [default: core, then default]",
)
@click.option(
    "--all",
    "every_plugin",
    is_flag=True,
    help="The default plan, and the default plan with every single plugin more or less. Weights are loaded in groups.",
)
@click.option(
    "--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Laps per plan."
)
@click.option("--raw", is_flag=True, help="No chat template: the model continues the prompt.")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write a line per plan to FILE.",
)
@click.option(
    "--history", is_flag=True, help="List the comparisons of this machine, newest first, and measure nothing."
)
@click.option("--limit", type=click.IntRange(1, MOST), default=20, show_default=True, metavar="N", help="Of --history.")
@as_json
@click.argument("prompt", type=TEXT, required=False)
def compare(
    options: EngineOptions,
    sampling: Sampling,
    doc: tuple[str, ...],
    system: str | None,
    think: bool | None,
    plans: tuple[str, ...],
    every_plugin: bool,
    repeats: int,
    raw: bool,
    csv_file: Path | None,
    history: bool,
    limit: int,
    as_json: bool,
    prompt: str | None,
) -> None:
    """Answer one PROMPT under several plans, in turn: lap times, speed-ups, and whether the answers are the same.

    \b
    pitlane compare "Say it again: one, two, three" --plan core --plan default --plan +prompt_lookup
    pitlane compare --doc report.pdf "What were the findings?" --plan default --plan +int8
    pitlane compare --doc report.pdf "What were the findings?" --all
    """
    if history:
        _show_history(limit, as_json)
        return
    from pitlane.ui.bench.groups import compare_in_groups as measure
    from pitlane.ui.bench.results import to_csv
    from pitlane.ui.commands.model_choice import choose
    from pitlane.ui.commands.run import read_prompt

    if every_plugin and plans:
        raise BadOption("--all makes the plans itself; give --all or --plan, and choose the default plan by --plugins")
    text = read_prompt(prompt)
    documents = add_documents(doc, options.plugins_dir)
    chosen = choose(
        replace(options, plugin_options=()), asks=True
    )  # --option belongs to the plans that hold the plugin
    with chosen.build() as engine:
        if every_plugin:
            resolved = _every_plugin(engine, options.plugin_options)
        else:
            resolved = _resolved(engine, plans or PLANS, options.plugin_options)
        chat = Chat(engine.tokenizer, system, think, raw)
        for document in documents:
            chat.add(*document)
        with progress("Comparing") as advance:
            comparison = measure(engine, resolved, chat.ask(text), sampling.greedy(), repeats, advance)
        report = comparison.to_json() | _environment()
    _remember(comparison.to_json(texts=False))
    if csv_file is not None:
        csv_file.write_text(to_csv(report), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        _print(report)


def _resolved(engine: Engine, texts: Sequence[str], options: Sequence[str]) -> dict[str, Plan]:
    """The plans by label, with their weights loaded, so that a plan that does not fit is refused before anything is measured."""
    from pitlane.ui.bench.plan_text import parse_plans
    from pitlane.ui.bench.turns import check_lanes

    plans = {}
    for label, parsed in parse_plans(texts, engine.default_plan.settings, engine.registry, options).items():
        plans[label] = engine.plan(parsed.settings)
        for replacement in parsed.replaced:
            note(f"{label}: {replacement}")
    check_lanes(engine, plans)
    for label, plan in plans.items():
        try:
            engine.lane_of(plan)
        except PitlaneError as error:
            error.add_note(f"this is the plan {label}")
            raise
    return plans


def _every_plugin(engine: Engine, options: Sequence[str]) -> dict[str, Plan]:
    """The default plan, and the plans that differ from it by one plugin. Plugins without such a plan are named."""
    from pitlane.ui.bench.groups import single_changes
    from pitlane.ui.plugin_text import parse_settings

    default = engine.plan(parse_settings(None, options, engine.default_plan.settings, engine.registry).settings)
    plans, reasons = single_changes(engine, default)
    for name, reason in reasons.items():
        note(f"{name} is not compared: {reason}")
    return {"default": default, **plans}


def _environment() -> dict[str, Any]:
    from pitlane.ui.bench.machine import commit, machine, versions

    return {"machine": machine(), "versions": versions(), "commit": commit()}


def _remember(report: Mapping[str, Any]) -> None:
    """Store the report without the words of the answers; warn if the data folder cannot be written."""
    from pitlane.storage.db import Store

    try:
        with Store() as store:
            store.comparisons.add(report)
    except StorageError as error:
        log.warning("this comparison is not kept: %s", error)


def _print(report: Mapping[str, Any]) -> None:
    from pitlane.ui.bench.report import gap_text, laps_text, scores_text

    plans = report["plans"]
    sampled = f"temperature {report['temperature']:g}, " if report["temperature"] else ""
    title = (
        f"{short_name(report['model'])}, {report['dtype']}, {sampled}seed {report['seed']}, {report['repeats']} laps"
    )
    print_table(HEADERS, [_row(plan) for plan in plans], title)
    for plan in plans:
        divergence = plan["divergence"]
        if divergence is not None:
            click.echo(
                f"{plan['label']}, from token {divergence['index'] + 1}, behind {_quoted(divergence['before'])}:"
            )
            click.echo(f"  {plans[0]['label']}: {_quoted(divergence['first'])}")
            click.echo(f"  {plan['label']}: {_quoted(divergence['other'])}")
        for text in (gap_text(plan, report["dtype"]), scores_text(plan, plans[0]), laps_text(plan)):
            if text:
                click.echo(f"{plan['label']}: {text}")
    for remark in report["notes"]:
        note(remark)


def _row(plan: Mapping[str, Any]) -> list[str]:
    from pitlane.ui.bench.report import answer_text, speed_text
    from pitlane.ui.bench.summary import show

    p50, p95 = ("-" if plan["tpot_ms"][name] is None else f"{plan['tpot_ms'][name]:.2f}" for name in ("p50", "p95"))
    return [
        plan["label"],
        answer_text(plan),
        speed_text(plan),
        show(plan["tokens_per_second"]),
        f"{plan['ttft_ms']['median']:.1f}",
        f"{p50}, {p95}",
        f"{plan['accepted_per_step']:.2f}" if plan["draft_tokens"] else "-",
        size(plan["weight_bytes"]),
        size(plan["kv_bytes"]),
    ]


def _quoted(text: str) -> str:
    return f"“{' '.join(text.split())}”" if text.strip() else "the end of the answer"


def _show_history(limit: int, as_json: bool) -> None:
    from pitlane.storage.db import Store

    with Store() as store:
        comparisons = store.comparisons.list(limit)
    if as_json:
        print_json([{"id": row.id, **row.report} for row in comparisons])
        return
    headers = ["when", "model", "plan", "answer", "speed", "tok/s", "TTFT ms"]
    print_table(headers, [line for row in comparisons for line in _history_rows(row)])


def _history_rows(row: StoredComparison) -> list[list[str]]:
    from pitlane.ui.bench.report import answer_text, speed_text

    when = datetime.fromtimestamp(row.created).strftime("%Y-%m-%d %H:%M")
    return [
        [
            *((when, short_name(row.model)) if index == 0 else ("", "")),
            plan["label"],
            answer_text(plan),
            speed_text(plan),
            f"{plan['tokens_per_second']['median']:.1f}",
            f"{plan['ttft_ms']['median']:.1f}",
        ]
        for index, plan in enumerate(row.report["plans"])
    ]
