"""Decode with and without compiled_step, in turn in one process, beside a plain read of the same bytes.

    python docs/step.py --offline --model smollm2
    python docs/step.py --offline --model smollm2 --busy     # beside one process that uses a core all the time
    python docs/step.py --offline --model smollm2 --linears int8

Rounds take turns: a read of as many bytes as a step reads (weights of linears and head, KV), an answer without the plugin, an
answer with it; then single forwards of 1 to 64 rows (a token and its draft) over a context of `--prompt` tokens, both ways in turn.
Prints tables and, as the last line, one JSON document. `read / step` is the fraction of the speed of memory that a step reaches:
1.0 is a step that takes no longer than the read. Steps are the forward alone, without sampling and the loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from pitlane import Draft, Engine, KVState, Plan, SamplingParams
from pitlane.engine.run.batch import Batch, Chunk
from pitlane.engine.run.lane import Lane
from pitlane.kernels.extension import cpu
from pitlane.kernels.linear import Packed
from pitlane.kernels.quantized import Quantized
from pitlane.ui.bench.machine import commit, machine, versions
from pitlane.ui.bench.summary import ratio, summary

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
WAYS = ("python", "compiled")


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Run another process that uses a core all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def bytes_of_step(lane: Lane, num_tokens: int) -> int:
    """Bytes that a decode step reads: packed linears, the head, and the KV of a context."""
    model: Any = lane.built.model
    linears = [
        model.head,
        *(part for layer in model.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)),
    ]
    weights = sum(linear.weight.nbytes for linear in linears if isinstance(linear, Packed))
    weights += sum(
        linear.form.num_bytes(linear.num_outputs, linear.num_inputs)
        for linear in linears
        if isinstance(linear, Quantized)
    )
    return weights + num_tokens * sum(plan.bytes_per_token for plan in lane.built.stores)


def answer(engine: Engine, plan: Plan, prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """Milliseconds per token (median) and the tokens of an answer."""
    result = engine.generate(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True), plan=plan)
    return result.stats["tpot_ms"]["p50"], result.token_ids


def batch_of(lane: Lane, num_tokens: int, rows: int) -> tuple[Batch, KVState]:
    """A token behind `num_tokens` computed tokens, with a chain of rows - 1 draft tokens. The KV holds what was in memory."""
    kv = KVState()
    assert lane.pool.reserve(kv, num_tokens + rows)
    kv.num_computed_tokens = num_tokens
    draft = Draft([7] * (rows - 1)) if rows > 1 else None
    return lane.builder.build([Chunk(kv, [5], draft, True)]), kv


def forward_ms(lane: Lane, batch: Batch, repeats: int) -> list[float]:
    times: list[float] = []

    def run() -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                begin = perf_counter()
                lane.runner.forward(batch)
                times.append(1e3 * (perf_counter() - begin))

    lane.call(run).result()
    return times


def read_ms(memory: torch.Tensor, threads: int) -> float:
    begin = perf_counter()
    cpu.read_bytes(memory.data_ptr(), memory.nbytes, threads)
    return 1e3 * (perf_counter() - begin)


def measured(engine: Engine, linears: str, threads: int, rounds: int, num_tokens: int, context: int) -> dict[str, Any]:
    left_out = ("prefix_cache", "compiled_step", "packed_linear")
    default = {name: options for name, options in engine.default_plan.settings.items() if name not in left_out}
    default[linears] = {}
    plans = {"python": engine.plan(default), "compiled": engine.plan(default | {"compiled_step": {}})}
    lanes = {way: engine.lane_of(plan) for way, plan in plans.items()}
    memory = torch.ones(bytes_of_step(lanes["python"], context), dtype=torch.uint8)
    prompt = [(17 * i) % 400 + 10 for i in range(context)]
    tokens, reads = {way: [] for way in WAYS}, []
    same = True
    for number in range(rounds + 1):
        reads.append(read_ms(memory, threads))
        results = {way: answer(engine, plans[way], prompt, num_tokens) for way in WAYS}
        same = same and results["python"][1] == results["compiled"][1]
        if number:  # the first round warms up
            for way in WAYS:
                tokens[way].append(results[way][0])
    rows: dict[int, dict[str, list[float]]] = {}
    for count in ROWS:
        batches = {way: batch_of(lanes[way], context, count) for way in WAYS}
        series = rows[count] = {"python": [], "compiled": [], "read": [], "worst": []}
        for number in range(rounds + 1):
            read = median(read_ms(memory, threads) for _ in range(3))
            times = {way: forward_ms(lanes[way], batches[way][0], 8) for way in WAYS}
            if number:
                series["read"].append(read)
                series["worst"].append(max(times["compiled"]))
                for way in WAYS:
                    series[way].append(sum(times[way]) / len(times[way]))
        for way in WAYS:
            lanes[way].pool.release(batches[way][1])
    return {
        "threads": threads,
        "step_bytes": memory.nbytes,
        "same_tokens": same,
        "decode_ms_per_token": {way: summary(values) for way, values in tokens.items()},
        "decode_ratio": ratio(tokens["python"], tokens["compiled"]),
        "read_ms": summary(reads),
        "rows": {count: _row(series) for count, series in rows.items()},
        "chunks_recomputed": cpu.step_recomputed(),
    }


def _row(series: dict[str, list[float]]) -> dict[str, Any]:
    return {
        **{f"{way}_ms": summary(series[way]) for way in (*WAYS, "read")},
        "worst_compiled_ms": max(series["worst"]),
        "python / compiled": ratio(series["python"], series["compiled"]),
        "read / python": ratio(series["read"], series["python"]),
        "read / compiled": ratio(series["read"], series["compiled"]),
    }


def table(result: dict[str, Any]) -> str:
    heads = ("rows", "python ms", "compiled ms", "worst", "read ms", "python / compiled", "read / compiled")
    lines = ["".join(f"{head:>24}" for head in heads)]
    for rows, row in result["rows"].items():
        gain, fraction = row["python / compiled"], row["read / compiled"]
        times = [row[key]["median"] for key in ("python_ms", "compiled_ms")]
        numbers = [f"{value:.2f}" for value in (*times, row["worst_compiled_ms"], row["read_ms"]["median"])]
        spread = f"{gain['ratio']:.2f} ({gain['low']:.2f}-{gain['high']:.2f})"
        cells = (str(rows), *numbers, spread, f"{fraction['ratio']:.2f}")
        lines.append("".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


@click.command()
@click.option("--model", default="smollm2")
@click.option("--offline", is_flag=True)
@click.option("--linears", type=click.Choice(["packed_linear", "int8", "int4"]), default="packed_linear")
@click.option("--threads", default=len(os.sched_getaffinity(0)))
@click.option("--rounds", default=10)
@click.option("--tokens", default=64, help="tokens of an answer")
@click.option("--prompt", default=128, help="tokens of the prompt and of the context of single forwards")
@click.option("--busy", is_flag=True, help="run beside one process that uses a core all the time")
def main(
    model: str, offline: bool, linears: str, threads: int, rounds: int, tokens: int, prompt: int, busy: bool
) -> None:
    if offline:
        os.environ["PITLANE_OFFLINE"] = "1"
    with neighbour(busy), Engine(model, dtype="bfloat16", threads=threads) as engine:
        result = measured(engine, linears, threads, rounds, tokens, prompt)
    decode = result["decode_ms_per_token"]
    medians = ", ".join(f"{way} {decode[way]['median']:.2f}" for way in WAYS)
    print(f"decode, ms a token: {medians}; python / compiled {result['decode_ratio']}")
    print(table(result))
    print(
        json.dumps(
            {
                "model": model,
                "linears": linears,
                "busy": busy,
                **result,
                "machine": machine(),
                "versions": versions(),
                "commit": commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
