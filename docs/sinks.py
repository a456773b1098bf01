"""What dropped tokens do to a model: python docs/sinks.py MODEL TEXT [N]. Options measure a book, a text without end, and speed.

Perplexity: the model reads the first N tokens (3,072 by default) of a text file, with all tokens, with a window alone, with
attention sinks, and with key-norm eviction. The window has 512 tokens and moves in blocks of 32; key-norm eviction shows at most
512 tokens too. Prints the perplexity by stretches of 1,024 positions and, as the last line, one JSON document. `positions >= 1024`
is the figure of docs/exactness.md.

--book MODEL TEXT [N] [FILE]: perplexity over position of N tokens (30,000), by stretches of 1,024 tokens. Attention to all tokens
runs 4,096 tokens beyond the context of the model. FILE.json and FILE.png hold the result.

--recomputation MODEL TEXT [N] [SAMPLES]: sinks against window recomputation at SAMPLES positions (100) of N tokens (8,192).
Recomputation reads the last 512 tokens alone, at the positions from 0 on: a prefill for every token.

--speed MODEL [ROUNDS]: time per token with sinks against plain decode of as many visible tokens, in turns in one process, and
against window recomputation: a prefill of the visible tokens for every new token. Wants a quiet machine.

--endless MODEL COUNT [FILE]: the model generates COUNT tokens in one answer, under its default plan without prefix_cache. Prints
time and memory by tenths of the answer and, as the last line, one JSON document; FILE.json and FILE.png (if matplotlib is there)
hold the same. `ms` is the time of a token on the engine's only thread, without the time that the thread waits for other processes.
The speed of a machine changes during so long a run. So every 200 steps the engine also computes 16 forwards of a token behind 63
fixed tokens. `ratio` is the time of a token divided by the time of such a forward. All three times are medians of a tenth.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import time
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import torch

from pitlane import Draft, Engine, KVState, Lane, Plugin, PluginRegistry, SamplingParams, StepStats, TextDelta, hookimpl

WINDOW, STRIDE, STEP, STRETCH = 512, 32, 64, 1024
SETTINGS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "window alone": {"attention_sinks": {"num_sinks": 0, "window": WINDOW, "stride": STRIDE}},
    "1 sink": {"attention_sinks": {"num_sinks": 1, "window": WINDOW, "stride": STRIDE}},
    "4 sinks": {"attention_sinks": {"num_sinks": 4, "window": WINDOW, "stride": STRIDE}},
    "key norms": {"key_norm_eviction": {"budget": WINDOW - STEP, "recent": WINDOW // 2, "interval": STEP}},
}
ENDLESS = {"attention_sinks": {"num_sinks": 4, "window": 64, "stride": 32}}
BEYOND = 4096  # tokens behind the context that attention to all tokens reads too, in the figure of a book
BOOK = ("all tokens", "window alone", "4 sinks")


def nats(engine: Engine, settings: dict[str, Any], token_ids: list[int]) -> list[float]:
    """Negative log-likelihood of every token but the first. A step is a known token and a draft of the tokens behind it."""
    from pitlane.engine.kv.eviction import evict_blocks
    from pitlane.engine.run.batch import Chunk

    lane, kv = engine.lane_of(engine.plan({**engine.default_plan.settings, **settings})), KVState()
    result: list[float] = []
    for start in range(0, len(token_ids) - 1, STEP):
        first, *draft = token_ids[start : min(start + STEP, len(token_ids) - 1)]
        stop = start + 1 + len(draft)
        assert lane.pool.reserve(kv, stop), "the text needs more KV memory"
        batch = lane.builder.build([Chunk(kv, [first], Draft(draft) if draft else None, True)])
        logits = lane.runner.run(batch).logits.float()
        targets = torch.tensor(token_ids[start + 1 : stop + 1])
        result += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        kv.num_computed_tokens = stop
        lane.pool.drop(kv, stop)
        evict_blocks(lane.pool, lane.stores, kv)
    lane.pool.release(kv)
    return result


def perplexity(values: list[float]) -> float:
    return round(exp(sum(values) / len(values)), 2)


def measure(model: str, text: str, num_tokens: int) -> dict[str, dict[str, float]]:
    """Perplexity by the name of a setting and by positions."""
    rows = {}
    with Engine(model, plugins=without_cache) as engine:
        token_ids = engine.tokenizer.encode(text)[:num_tokens]
        for name, settings in SETTINGS.items():
            values = nats(engine, settings, token_ids)
            cuts = [*range(0, len(values), STRETCH), len(values)]
            row = {f"{low}-{high - 1}": perplexity(values[low:high]) for low, high in pairwise(cuts)}
            rows[name] = row | {"positions >= 1024": perplexity(values[STRETCH:] or values)}
            print(f"{name:14}", *(f"{place}: {value:8.2f} " for place, value in rows[name].items()))
    return rows


def by_stretch(values: list[float]) -> dict[str, float]:
    """Perplexity by the first position of a stretch. The last stretch may be shorter."""
    return {str(low): perplexity(values[low : low + STRETCH]) for low in range(0, len(values), STRETCH)}


def recomputed(engine: Engine, token_ids: list[int], places: list[int]) -> list[float]:
    """Negative log-likelihood of the token behind each place, from a prefill of the last `WINDOW` tokens alone."""
    from pitlane.engine.run.batch import Chunk

    lane, result = engine.lane_of(engine.default_plan), []
    for place in places:
        kv = KVState()
        assert lane.pool.reserve(kv, WINDOW), "the window needs more KV memory"
        chunk = Chunk(kv, token_ids[place + 1 - WINDOW : place + 1], None, True)
        logits = lane.runner.run(lane.builder.build([chunk])).logits.float()
        result.append(-float(logits[0].log_softmax(-1)[token_ids[place + 1]]))
        lane.pool.release(kv)
    return result


def without_cache(default: dict[str, Any]) -> dict[str, Any]:
    return {name: options for name, options in default.items() if name != "prefix_cache"}


def book(model: str, text: Path, num_tokens: int, target: Path | None) -> None:
    """Print and store the perplexity over position."""
    values = {}
    with Engine(model, plugins=without_cache, kv_memory=2**31) as engine:
        context = engine.loader.context
        token_ids = engine.tokenizer.encode(text.read_text(encoding="utf-8"))[:num_tokens]
        for name in BOOK:
            read = token_ids[: context + BEYOND] if name == "all tokens" else token_ids
            values[name] = nats(engine, SETTINGS[name], read)
            print(name, json.dumps(by_stretch(values[name])), flush=True)
    result = {"model": model, "text": text.name, "tokens": len(token_ids), "context": context}
    result["perplexity"] = {name: by_stretch(row) for name, row in values.items()}
    if target is not None:
        target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot_book(result, target.with_suffix(".png"))
    print(json.dumps(result))


def against_recomputation(model: str, text: Path, num_tokens: int, num_samples: int) -> None:
    """Print the perplexity of sinks and of window recomputation at the same places, and the ratio with its standard error."""
    with Engine(model, plugins=without_cache) as engine:
        token_ids = engine.tokenizer.encode(text.read_text(encoding="utf-8"))[:num_tokens]
        stride = max(1, (len(token_ids) - 1 - STRETCH) // num_samples)
        places = list(range(STRETCH, len(token_ids) - 1, stride))[:num_samples]
        values = nats(engine, SETTINGS["4 sinks"], token_ids)
        sinks, again = [values[place] for place in places], recomputed(engine, token_ids, places)
    ratios = torch.tensor(sinks) - torch.tensor(again)
    result = {"model": model, "text": text.name, "tokens": len(token_ids), "samples": len(places)}
    result |= {"sinks": perplexity(sinks), "recomputation": perplexity(again)}
    result["ratio"] = round(float(ratios.mean().exp()), 4)
    result["standard_error"] = round(float(ratios.std() / len(places) ** 0.5), 4)
    print(json.dumps(result))


def plot_book(result: dict[str, Any], target: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for name, row in result["perplexity"].items():
        axes.plot([(int(low) + STRETCH / 2) / 1000 for low in row], list(row.values()), label=name)
    axes.axvline(result["context"] / 1000, color="grey", linestyle=":", label="context of the model")
    axes.set_yscale("log")
    axes.set_xlabel("position, thousand tokens")
    axes.set_ylabel("perplexity")
    axes.set_ylim(25, 250)
    axes.legend(loc="upper right", ncol=2)
    figure.tight_layout()
    figure.savefig(target, dpi=80)


class Pace(Plugin):
    """Times the steps of an answer, and in turn with them forwards over fixed tokens. Both times are of the engine's thread."""

    name, exactness = "pace", "identical"
    NUM_STEPS, NUM_FORWARDS, NUM_TOKENS = 200, 16, 64

    def prepare(self, lane: Lane) -> None:
        """Compute the fixed tokens. Runs on the engine's thread, before the answer."""
        from pitlane.engine.run.batch import Chunk

        self.lane, self.kv = lane, KVState()
        assert lane.pool.reserve(self.kv, self.NUM_TOKENS), "the fixed tokens need KV memory"
        lane.runner.run(lane.builder.build([Chunk(self.kv, [1] * self.NUM_TOKENS, None, True)]))
        self.kv.num_computed_tokens = self.NUM_TOKENS - 1
        self.num_steps, self.start = 0, 0.0
        self.times: list[tuple[float, float]] = []  # milliseconds of a token and of a forward, since the last row

    def row(self) -> dict[str, float]:
        """Return the medians since the last row."""
        times, self.times = self.times, []
        medians = [
            statistics.median(values) for values in zip(*((*pair, pair[0] / pair[1]) for pair in times), strict=True)
        ]
        return {name: round(value, 4) for name, value in zip(("ms", "forward_ms", "ratio"), medians, strict=True)}

    @hookimpl
    def step_finished(self, stats: StepStats) -> None:
        from pitlane.engine.run.batch import Chunk

        self.num_steps += 1
        if self.num_steps % self.NUM_STEPS:
            return
        stop, start = time.thread_time(), self.start
        for _ in range(self.NUM_FORWARDS):
            self.lane.runner.run(self.lane.builder.build([Chunk(self.kv, [1], None, True)]))
        self.start = time.thread_time()
        if start:
            token, forward = (stop - start) / self.NUM_STEPS, (self.start - stop) / self.NUM_FORWARDS
            self.times.append((1e3 * token, 1e3 * forward))

    @hookimpl
    def sequence_finished(self) -> None:
        self.lane.pool.release(self.kv)


def endless_plan(default: dict[str, Any]) -> dict[str, Any]:
    return {**without_cache(default), **ENDLESS, Pace.name: {}}


def generate(model: str, num_tokens: int) -> list[dict[str, float]]:
    """Generate an answer under attention sinks, the reader in step with the engine. A row per tenth of the answer."""
    rows: list[dict[str, float]] = []
    registry = PluginRegistry.load()
    registry.add(Pace)
    with Engine(model, plugins=endless_plan, registry=registry, threads=1) as engine:
        print(*engine.default_plan.settings, str(engine.loader.dtype), flush=True)
        lane = engine.lane_of(engine.default_plan)
        pace = next(plugin for plugin in engine.default_plan.plugins if isinstance(plugin, Pace))
        lane.call(lambda: pace.prepare(lane)).result()
        sampling = SamplingParams(max_tokens=2 * num_tokens, ignore_eos=True, temperature=1.0, seed=0)
        count = 0
        for event in engine.submit("Once", sampling):
            if not isinstance(event, TextDelta):
                continue
            count += len(event.token_ids)
            if event.token_ids and count * 10 // num_tokens > len(rows):
                blocks = lane.pool.num_blocks - lane.pool.num_free_blocks
                rows.append({"tokens": count, **pace.row(), "mb": resident_mb(), "kv_blocks": blocks})
                print(*(f"{name} {value:,.3f}" for name, value in rows[-1].items()), flush=True)
            if (
                len(rows) == 10
            ):  # stop before the engine makes the result and its stats: their memory would count in the last tenth
                break
    return rows


def speed(model: str, rounds: int) -> None:
    """Print times per token in ms: medians over the rounds, and the ratios with their range over the middle half of the rounds.

    The prompts are random tokens. A position sees 4 sinks and 993 to 1,024 tokens; plain decode sees as many on average.
    """
    num_sinks, window, count = 4, 1024, STRIDE + 1
    rng = random.Random(0)
    with Engine(model) as engine:
        roles = {name: engine.registry.get(name).role for name in engine.default_plan.settings}
        base = {name: o for name, o in engine.default_plan.settings.items() if roles[name] != "drafter"}
        sinks = engine.plan({**base, "attention_sinks": {"num_sinks": num_sinks, "window": window, "stride": STRIDE}})
        plans = {"plain": engine.plan(base), "sinks": sinks}
        again = engine.plan({name: options for name, options in base.items() if name != "prefix_cache"})
        vocab = engine.tokenizer.vocab_size
        lengths = {"plain": num_sinks + window - STRIDE, "sinks": 3 * window}
        prompts = {name: [rng.randrange(vocab) for _ in range(length)] for name, length in lengths.items()}
        sampling = SamplingParams(max_tokens=count, ignore_eos=True)
        rows: dict[str, list[float]] = {"plain": [], "sinks": [], "recomputation": []}
        for turn in range(rounds + 1):  # the first round fills the cache
            for name in ("plain", "sinks") if turn % 2 else ("sinks", "plain"):
                stats = engine.generate(prompts[name], sampling, plan=plans[name]).stats
                assert turn == 0 or stats["cached_tokens"] > lengths[name] - 64, "the prompt comes from the cache"
                rows[name].append(stats["decode_ms"] / (count - 1))
            stats = engine.generate(prompts["plain"], SamplingParams(max_tokens=1), plan=again).stats
            rows["recomputation"].append(stats["prefill_ms"])
    rows = {name: values[1:] for name, values in rows.items()}
    ratios = {
        "sinks / plain": [b / a for a, b in zip(rows["plain"], rows["sinks"], strict=True)],
        "recomputation / sinks": [b / a for a, b in zip(rows["sinks"], rows["recomputation"], strict=True)],
    }
    for name, values in (*rows.items(), *ratios.items()):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:22} {middle:9.3f}   ({low:.3f} to {high:.3f})")
    medians = {name: round(statistics.median(values), 4) for name, values in (*rows.items(), *ratios.items())}
    print(json.dumps({"model": model, "rounds": rounds, "torch": torch.__version__, **medians}))


def resident_mb() -> float:
    """Memory of the process now; where the system does not tell, its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def endless(model: str, num_tokens: int, target: Path | None) -> None:
    """Print and store the rows, and how much the last tenth differs from the first."""
    rows = generate(model, num_tokens)
    change = {name: round(rows[-1][name] / rows[0][name] - 1, 4) for name in ("ms", "ratio", "mb")}
    result = {"model": model, "tokens": num_tokens, "tenths": rows, "last_against_first": change}
    if target is not None:
        target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(rows, target.with_suffix(".png"))
    print(json.dumps(result))


def plot(rows: list[dict[str, float]], target: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 2.6))
    places = [row["tokens"] / 1000 for row in rows]
    labels = ({"ms": "token", "forward_ms": "forward"}, {"ratio": "token / forward"}, {"mb": "process"})
    for axes, names, unit in zip(panels, labels, ("ms", "ratio", "MB"), strict=True):
        for name, label in names.items():
            axes.plot(places, [row[name] for row in rows], marker="o", markersize=3, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("thousand tokens")
        axes.set_ylabel(unit)
        axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--endless":
        endless(rest[0], int(rest[1]), Path(rest[2]) if len(rest) > 2 else None)
    elif first == "--speed":
        speed(rest[0], int(rest[1]) if len(rest) > 1 else 12)
    elif first == "--book":
        book(rest[0], Path(rest[1]), int([*rest, "30000"][2]), Path(rest[3]) if len(rest) > 3 else None)
    elif first == "--recomputation":
        numbers = [*map(int, rest[2:]), *(8192, 100)[len(rest) - 2 :]]
        against_recomputation(rest[0], Path(rest[1]), *numbers)
    else:
        count = int(rest[1]) if len(rest) > 1 else 3072
        figures = measure(first, Path(rest[0]).read_text(encoding="utf-8"), count)
        print(json.dumps({"model": first, "text": Path(rest[0]).name, "tokens": count, "perplexity": figures}))
