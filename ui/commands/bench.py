"""`pitlane bench`: a table for people, or with `--json` one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pitlane import SamplingParams
from pitlane.storage.errors import PitlaneError
from pitlane.ui.commands.options import MOST, as_json, engine_options
from pitlane.ui.plugin_text import parse_settings
from pitlane.ui.render import note, print_json, print_table, progress
from pitlane.ui.session import Chat, EngineOptions, add_documents

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt
    from pitlane.storage.types import Document, Run, StoredDocument

MARGIN = 64  # tokens of context after prompt and answer


@click.group(invoke_without_command=True)
@engine_options
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N")
@click.option(
    "--steps", type=click.IntRange(2), default=32, show_default=True, metavar="N", help="Decode steps per block."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Blocks per side.")
@click.option(
    "--vs",
    type=click.Choice(["transformers"]),
    help="Also measure this library: random weights, a process of its own, in turn.",
)
@as_json
@click.pass_context
def bench(
    ctx: click.Context,
    options: EngineOptions,
    prompt_tokens: int,
    steps: int,
    repeats: int,
    vs: str | None,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed of one request, by default of the bare core. Each side runs in a process of its own.

    \b
    pitlane bench --model random:llama-1b --dtype bfloat16 --vs transformers
    """
    if ctx.invoked_subcommand is not None:
        return
    from pitlane.ui.bench.child import children
    from pitlane.ui.bench.speed import compare, measure_in_turn
    from pitlane.ui.commands.model_choice import fetch

    fetch(options.model, options.plugins_dir)
    context = options.context or prompt_tokens + steps + MARGIN
    plugins = "" if options.plugins is None and not options.plugin_options else options.plugins
    with children(replace(options, plugins=plugins, context=context), vs) as sides:
        facts = sides["pitlane"].facts
        with progress("Measuring") as advance:
            measure_in_turn(list(sides.values()), facts["vocab_size"], prompt_tokens, steps, repeats, advance)
    report = facts["head"] | {"prompt_tokens": prompt_tokens, "steps": steps}
    report |= {name: side.blocks.to_json() for name, side in sides.items()}
    if vs:
        report["ratio"] = compare(sides["pitlane"].blocks, sides[vs].blocks)
    _print(
        report, _speed_rows(report, list(sides)), ["", "prefill tok/s", "decode ms/token", "outside forward"], as_json
    )


@bench.command()
@engine_options
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SET",
    help="A plugin set, as in --plugins. Repeatable; the first "
    "is compared with.  [default: the default set, then the set with one more plugin or one less]",
)
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="A file with one prompt per line."
)
@click.option("--doc", multiple=True, metavar="FILE", help="Ask over this document. Repeatable.")
@click.option("--max-tokens", type=click.IntRange(2), default=128, show_default=True, metavar="N")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T")
@click.option("--seed", type=int, default=0, show_default=True, metavar="S")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, metavar="N")
@as_json
def plugins(
    options: EngineOptions,
    sets: tuple[str, ...],
    prompts: str | None,
    doc: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    seed: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Compare plugin sets on the same prompts: tokens per step, speed, and whether the ids are the same."""
    from pitlane.ui.bench.machine import head
    from pitlane.ui.bench.plans import PROMPTS, compare_plans, own_home
    from pitlane.ui.commands.model_choice import fetch

    sampling = SamplingParams(max_tokens, temperature, seed=seed)
    texts = _lines(prompts) if prompts else list(PROMPTS)
    documents = add_documents(doc, options.plugins_dir)
    fetch(options.model, options.plugins_dir)
    with own_home(), options.build() as engine:
        plans = _plans(engine, sets)
        with progress("Measuring") as advance:
            rows = compare_plans(engine, plans, _prompts(engine, texts, documents), sampling, repeats, advance)
        report = head(engine) | {"prompts": len(texts), "max_tokens": max_tokens, "temperature": temperature}
    report["sets"] = [row.to_json(rows[0]) for row in rows]
    headers = ["plugins", "tokens/step", "accepted", "tok/s", "speed (95 %)", "TTFT ms", "identical ids"]
    _print(report, _plan_rows(report["sets"]), headers, as_json)
    if any(row["exactness"] == "identical" and not row["identical"] for row in report["sets"]):
        note(f"identical is proved in float64; in {report['dtype']} a forward of another shape rounds differently")


@bench.command()
@click.option("--quick", is_flag=True, help="One shape and few numbers of rows: less than a minute.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Processor threads.  [default: as torch]")
@as_json
def kernels(quick: bool, threads: int | None, as_json: bool) -> None:
    """Measure the linears in C beside a read of the same bytes, and beside the processor's rate of products."""
    import torch

    from pitlane.ui.bench.kernels import measure
    from pitlane.ui.bench.machine import commit, machine, versions

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        with progress("Measuring") as advance:
            report = measure(quick, advance) | {"machine": machine(), "versions": versions(), "commit": commit()}
    finally:
        torch.set_num_threads(before)
    if as_json:
        print_json(report)
        return
    headers = ["kernel", "shape", "M", "us", "GB/s", "of probe", "Gop/s", "of ceiling"]
    facts = report["machine"]
    print_table(headers, [_kernel_row(line) for line in report["lines"]], f"{facts['threads']} threads, {facts['cpu']}")


def _kernel_row(line: dict[str, Any]) -> list[str]:
    limit = "-" if line["of_ceiling"] is None else f"{line['of_ceiling']:.2f}"
    names = [line["kernel"], f"{line['outputs']} x {line['inputs']}", str(line["rows"])]
    rates = [f"{line[name]:.1f}" for name in ("us", "gb_per_s")]
    return [*names, *rates, f"{line['of_probe']:.2f}", f"{line['gop_per_s']:.1f}", limit]


@bench.command()
@click.option("--limit", type=click.IntRange(1, MOST), default=20, show_default=True, metavar="N")
@as_json
def history(limit: int, as_json: bool) -> None:
    """Lap times of the last answers on this machine (run, chat and page), newest first."""
    from pitlane.storage.db import Store

    with Store() as store:
        runs = store.runs.list(limit)
    if as_json:
        print_json([{"id": run.id, "created": run.created, **run.stats} for run in runs])
        return
    headers = ["when", "model", "plugins", "prompt", "cached", "TTFT ms", "tokens", "tok/s"]
    print_table(headers, [_history_row(run) for run in runs])


def _history_row(run: Run) -> list[Any]:
    stats = run.stats
    when = datetime.fromtimestamp(run.created).strftime("%Y-%m-%d %H:%M")
    names = ", ".join(stats["plugins"]) or "(none)"
    counts = [stats[f"{name}_tokens"] for name in ("prompt", "cached", "completion")]
    speed = "-" if stats["tokens_per_second"] is None else f"{stats['tokens_per_second']:.1f}"
    return [when, stats["model"], names, *counts[:2], f"{stats['ttft_ms']:.1f}", counts[2], speed]


def _plans(engine: Engine, sets: Sequence[str]) -> dict[str, Plan]:
    """Plans of the named sets. Without sets: the default plan, and a plan for every plugin that can be added or removed."""
    default, registry = engine.default_plan.settings, engine.registry
    names = sets or [f"{'-' if name in default else '+'}{name}" for name in sorted(registry.togglable())]
    plans = {} if sets else {"default": engine.default_plan}
    for name in names:
        try:
            settings, replaced = parse_settings(name, (), default, registry)
            plans[name] = engine.plan(settings)
            engine.lane_of(plans[name])
            for replacement in replaced:
                note(str(replacement))
        except PitlaneError as error:
            if sets:
                raise
            note(f"left out {name}: {error}")
            plans.pop(name, None)
    return plans


def _print(report: dict[str, Any], rows: list[list[str]], headers: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    machine = report["machine"]
    title = f"{report['model']}, {report['dtype']}, {machine['threads']} threads, {machine['cpu']}"
    print_table(headers, rows, title)


def _speed_rows(report: dict[str, Any], names: list[str]) -> list[list[str]]:
    from pitlane.ui.bench.summary import show

    rows = []
    for name in names:
        side = report[name]
        share = f"{100 * side['outside_forward']['median']:.2f} %" if "outside_forward" in side else "-"
        rows.append([name, show(side["prefill_tokens_per_second"]), show(side["decode_ms"], 2), share])
    if "ratio" in report:
        rows.append(["times as fast", _interval(report["ratio"]["prefill"]), _interval(report["ratio"]["decode"]), ""])
    return rows


def _plan_rows(sets: list[dict[str, Any]]) -> list[list[str]]:
    from pitlane.ui.bench.summary import show

    return [
        [
            row["plugins"] or "(none)",
            f"{row['tokens_per_step']:.2f}",
            f"{row['accepted_tokens']} of {row['draft_tokens']}" if row["draft_tokens"] else "-",
            show(row["tokens_per_second"]),
            _interval(row["speed"]),
            f"{row['ttft_ms']['median']:.1f}",
            "yes" if row["identical"] else f"no, {row['identical_answers']} of {row['answers']}",
        ]
        for row in sets
    ]


def _interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _lines(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PitlaneError(
            f"{path} cannot be read as text ({error}); give a UTF-8 file with one prompt per line"
        ) from None
    if not lines:
        raise PitlaneError(f"{path} holds no prompt; write one prompt per line")
    return lines


def _prompts(
    engine: Engine, texts: Sequence[str], documents: Sequence[tuple[Document, StoredDocument]]
) -> list[Prompt]:
    prompts = []
    for text in texts:
        chat = Chat(engine.tokenizer)
        for document in documents:
            chat.add(*document)
        prompts.append(chat.ask(text))
    return prompts
