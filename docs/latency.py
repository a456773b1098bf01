"""Inter-token latency of a running stream while a long prompt is admitted: python docs/latency.py [PLOT].

Three runs on `random:llama-1b` in bfloat16: a prompt of 4,096 tokens alone, beside a stream that a client reads, and beside a
stream that nobody reads (then a step may hold 512 prompt tokens). Prints a table and, as the last line, one JSON document.
PLOT: a file for the plot. Takes about two minutes on two cores, and needs a quiet machine.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import numpy as np

from pitlane import Engine, SamplingParams, TextDelta

MODEL, LONG, QUIET_TOKENS = "random:llama-1b", 4096, 40


class Reader:
    """Reads a stream in its own thread, and notes the time of every token."""

    def __init__(self, engine: Engine) -> None:
        self.stream = engine.submit(list(range(100, 164)), SamplingParams(max_tokens=2000, ignore_eos=True))
        self.times: list[float] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        for event in self.stream:
            if isinstance(event, TextDelta):
                self.times.append(time.perf_counter())

    def wait_for(self, num_tokens: int) -> None:
        while len(self.times) < num_tokens:
            time.sleep(0.005)

    def gaps(self, start: float, stop: float) -> list[float]:
        """Milliseconds between the tokens that came in [start, stop]."""
        times = np.array(self.times)
        milliseconds: list[float] = (1e3 * np.diff(times))[(times[1:] >= start) & (times[1:] <= stop)].tolist()
        return milliseconds


def times_of_prompt(engine: Engine, first_token: int) -> tuple[float, float]:
    """The times when a long prompt is submitted and when its first token is there."""
    started = time.perf_counter()
    prompt = [first_token + index % 30000 for index in range(LONG)]
    engine.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    return started, time.perf_counter()


def beside_a_stream(engine: Engine, first_token: int) -> dict[str, Any]:
    reader = Reader(engine)
    reader.wait_for(8 + QUIET_TOKENS)
    quiet_from = reader.times[8]
    started, stopped = times_of_prompt(engine, first_token)
    reader.stream.abort()
    reader.thread.join()
    return {
        "quiet_ms": reader.gaps(quiet_from, started),
        "admission_ms": reader.gaps(started, stopped),
        "prompt_seconds": stopped - started,
    }


def measure() -> dict[str, Any]:
    """The gaps between tokens in milliseconds, and the seconds to the first token of the long prompt."""
    with Engine(MODEL, dtype="bfloat16", threads=2) as engine:
        engine.generate(list(range(64)), SamplingParams(max_tokens=8, ignore_eos=True))
        started, stopped = times_of_prompt(engine, 1000)
        runs = {"alone_seconds": stopped - started, "read": beside_a_stream(engine, 1001)}
        engine.loop.watch = lambda ids: None  # type: ignore[method-assign]
        return runs | {"unread": beside_a_stream(engine, 1002)}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Medians and 95th percentiles of the gaps, and the slowdown of the long prompt."""
    result: dict[str, Any] = {"prompt_alone_s": round(runs["alone_seconds"], 2)}
    for name in ("read", "unread"):
        run = runs[name]
        quiet = np.percentile(run["quiet_ms"], [50, 95])
        during = np.percentile(run["admission_ms"], [50, 95, 100])
        result[name] = {
            "quiet_p50_ms": round(float(quiet[0]), 1),
            "quiet_p95_ms": round(float(quiet[1]), 1),
            "admission_p50_ms": round(float(during[0]), 1),
            "admission_p95_ms": round(float(during[1]), 1),
            "admission_max_ms": round(float(during[2]), 1),
            "p95_over_quiet_p50": round(float(during[1] / quiet[0]), 2),
            "p95_over_quiet_p95": round(float(during[1] / quiet[1]), 2),
            "tokens_meanwhile": len(run["admission_ms"]),
            "prompt_s": round(run["prompt_seconds"], 2),
            "prompt_slowdown": round(run["prompt_seconds"] / runs["alone_seconds"], 2),
        }
    return result


def draw(runs: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    labels = {
        "read": "a client reads the stream: the time of a step is limited",
        "unread": "nobody reads the stream: up to 512 prompt tokens a step",
    }
    for name, label in labels.items():
        gaps = runs[name]["quiet_ms"][-30:] + runs[name]["admission_ms"]
        seconds = np.cumsum(gaps) / 1e3 - sum(runs[name]["quiet_ms"][-30:]) / 1e3
        axis.plot(seconds, gaps, ".-", markersize=4, linewidth=0.8, label=label)
    quiet = float(np.median(runs["read"]["quiet_ms"]))
    axis.axhline(2.5 * quiet, color="grey", linestyle=":", linewidth=1, label="2.5 times quiet")
    axis.set(yscale="log", xlabel="seconds since a prompt of 4,096 tokens was submitted", ylabel="ms between tokens")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    measured = measure()
    for key, value in (short := summary(measured)).items():
        print(key, value)
    if len(sys.argv) > 1:
        draw(measured, sys.argv[1])
    print(json.dumps(short))
