"""What quantized KV does to a model: python docs/kv_quality.py [MODEL ...] [--text FILE] [--tokens N] [--dtype D].

--questions FOLDER asks the questions about the documents of a folder instead (examples/document_adapter/README.md describes the
folder), with the adapter for documents if the model has one, under the default plan and every format: the right answers, and the
answers that differ from those over unquantized KV. Run it with PYTHONPATH=examples.

--speed measures the time per token at 8,000 tokens of context instead, or at the longest context of the model: every format in
turns with unquantized KV, in one process. Wants a quiet machine.

For every format of `kv_quant`: the perplexity of a text, the KL divergence from the unquantized next-token distribution, the share
of probability that moves, and the context that fits in 2 GB of KV. A table, then a line of JSON. Without --text: the pages of the
bundled sample PDF. Every token is predicted once, from KV that was written in steps of 512 tokens.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import click
import torch

from pitlane import Engine, KVState, Plan, Prompt, SamplingParams, load_document
from pitlane.engine.run.batch import Chunk

FORMATS = ("int8", "int4", "fp8")
ROOM = 2 * 10**9  # bytes of KV
ROWS = 256  # rows of logits to compare at a time: bounds the memory of large vocabularies


def logits_of(engine: Engine, plan: Plan, token_ids: list[int]) -> torch.Tensor:
    """Return the logits [T, V] behind every token, in float32. Runs on the engine's thread."""
    lane = engine.lane_of(plan)

    def run() -> torch.Tensor:
        kv, parts = KVState(), []
        assert lane.pool.reserve(kv, len(token_ids)), "too little KV memory"
        try:
            for start in range(0, len(token_ids), lane.limits.max_step_tokens):
                part = token_ids[start : start + lane.limits.max_step_tokens]
                batch = lane.builder.build([Chunk(kv, part, None, False)])
                parts.append(lane.runner.run(replace(batch, logit_rows=torch.arange(len(part)))).logits.float())
                kv.num_computed_tokens = start + len(part)
        finally:
            lane.pool.release(kv)
        return torch.cat(parts)

    result: list[torch.Tensor] = []
    engine.worker.call(lambda: result.append(run())).result()
    return result[0]


def compare(logits: torch.Tensor, exact: torch.Tensor, token_ids: list[int]) -> dict[str, float]:
    """Perplexity of the text, mean KL(exact || quantized) in nats, and the mean share of probability that moves."""
    target, count = torch.tensor([*token_ids[1:], 0])[:, None], len(token_ids)
    nats = kl = moved = 0.0
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        log_p, log_q = exact[rows].log_softmax(-1), logits[rows].log_softmax(-1)
        own = -log_q.gather(1, target[rows])
        nats += float(own[: count - 1 - start].sum())  # no token follows the last
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        moved += float((log_p.exp() - log_q.exp()).abs().sum() / 2)
    return {"perplexity": exp(nats / (count - 1)), "kl": kl / count, "moved": moved / count}


def measure(engine: Engine, token_ids: list[int], base: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for the dense store and for every format. base: settings of the other plugins."""
    rows, exact = [], None
    for name in (None, *FORMATS):
        plan = engine.plan(base if name is None else {**base, "kv_quant": {"format": name}})
        logits = logits_of(engine, plan, token_ids)
        exact = logits if exact is None else exact
        per_token = engine.lane_of(plan).kv_bytes_per_token
        fits = {"bytes_per_token": per_token, "context_in_2_gb": ROOM // per_token}
        rows.append({"format": name or "dense", **compare(logits, exact, token_ids), **fits})
    return rows


def sample_text() -> str:
    sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
    return "\n".join(page.text for page in sample.pages)


def tokens_of(engine: Engine, text: str, limit: int) -> list[int]:
    prompt: Prompt = engine.tokenizer.render_raw(text)
    return list(prompt.token_ids)[:limit]


def ask(model: str, folder: Path) -> dict[str, dict[str, int]]:
    """By format: right answers, refusals of questions without an answer, and answers that differ from those over unquantized KV."""
    from bundled_model.evaluation import handwritten
    from document_adapter.evaluate import Answers

    questions, rows, exact = handwritten.read_questions(folder), {}, None
    chats = handwritten.chats(folder, questions)
    with Engine(model) as engine:
        base = engine.document_plan.settings
        for name in (None, *FORMATS):
            answers = Answers(engine, base if name is None else {**base, "kv_quant": {"format": name}}).answer(chats)
            marks = [handwritten.judge(*pair) for pair in zip(questions, answers, strict=True)]
            exact = exact or answers
            row = rows[name or "dense"] = {
                "right": sum(bool(mark.value) for mark in marks),
                "answerable": sum(mark.value is not None for mark in marks),
                "refused": sum(bool(mark.refused) for mark in marks if mark.value is None),
                "unanswerable": sum(mark.value is None for mark in marks),
                "differing": sum(answer != before for answer, before in zip(answers, exact, strict=True)),
            }
            click.echo(f"{model}, {name or 'dense'}: {row}")
    return rows


def speed(model: str, rounds: int) -> dict[str, Any]:
    """Time per token in ms by format, medians over the rounds, and the ratio: time over unquantized KV / time of the format."""
    count, times = 33, {}
    with Engine(model) as engine:
        roles = {name: engine.registry.get(name).role for name in engine.default_plan.settings}
        base = {name: o for name, o in engine.default_plan.settings.items() if roles[name] != "drafter"}
        plans = {"dense": engine.plan(base)} | {n: engine.plan({**base, "kv_quant": {"format": n}}) for n in FORMATS}
        length = min(8000, engine.loader.context - count - 1)
        rng = random.Random(0)
        prompt = [rng.randrange(engine.tokenizer.vocab_size) for _ in range(length)]
        for turn in range(rounds + 1):  # the first round fills the cache
            for name, plan in plans.items() if turn % 2 else reversed(plans.items()):
                stats = engine.generate(prompt, SamplingParams(max_tokens=count, ignore_eos=True), plan=plan).stats
                assert turn == 0 or stats["cached_tokens"] > length - 64, "the prompt comes from the cache"
                times.setdefault(name, []).append(stats["decode_ms"] / (count - 1))
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["dense"][1:], values[1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ms": round(statistics.median(values[1:]), 3), "speed": round(middle, 4)}
        click.echo(f"{name:6} {rows[name]['ms']:9.3f} ms   {middle:.3f} times dense ({low:.3f} to {high:.3f})")
    return {"context": length, "rounds": rounds, "formats": rows}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--text", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=2048, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--questions", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--speed", "is_speed", is_flag=True)
@click.option("--rounds", default=8, show_default=True, help="of --speed")
def main(
    models: tuple[str, ...],
    file: Path | None,
    tokens: int,
    dtype: str,
    questions: Path | None,
    is_speed: bool,
    rounds: int,
) -> None:
    if is_speed:
        click.echo(json.dumps({model: speed(model, rounds) for model in models or ("bundled",)}))
        return
    if questions is not None:
        click.echo(json.dumps({model: ask(model, questions) for model in models or ("bundled",)}))
        return
    results = {}
    for model in models or ("bundled",):
        with Engine(model, dtype=dtype, plugins={}, kv_memory=2**32) as engine:
            text = file.read_text(encoding="utf-8") if file else sample_text()
            ids = tokens_of(engine, text, min(tokens, engine.loader.context - 1))
            rows = results[model] = measure(engine, ids, {})
        click.echo(f"\n{model}, {dtype}, {len(ids)} tokens of {file.name if file else 'the sample PDF'}\n")
        click.echo(
            "| format | bytes per token | context in 2 GB | perplexity | KL (nats) | moved |\n|---|---|---|---|---|---|"
        )
        for row in rows:
            click.echo(
                f"| {row['format']} | {row['bytes_per_token']:,} | {row['context_in_2_gb']:,} | {row['perplexity']:.3f} "
                f"| {row['kl']:.6f} | {row['moved']:.2%} |"
            )
    click.echo(json.dumps({"torch": torch.__version__, "dtype": dtype, "results": results}))


if __name__ == "__main__":
    main()
