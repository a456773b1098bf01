"""Tokens per target forward of each drafter, and of lookahead for several W, N and G: python docs/drafting.py [PLOT].

The bundled model runs each drafter with its default options. The governor is off, since it would limit drafts by their time. Texts:
answers about generated documents, and 96 tokens that continue the beginnings of this project's documentation (prose) and source
files (code). Prints a table and, as the last line, one JSON document. PLOT: a file for the plot of lookahead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pitlane import Engine, SamplingParams, TextDelta
from pitlane.engine.pacing.governor import Governor

ROOT = Path(__file__).resolve().parents[1]
DRAFTERS = ("prompt_lookup", "speculative", "self_speculation", "jacobi", "lookahead")
NUM_CHATS, NUM_TEXTS, PROMPT_TOKENS, NEW_TOKENS = 24, 12, 192, 96
WINDOWS, NGRAMS, CANDIDATES, NUM_COMPRESSED = (2, 4, 8, 16), (2, 3, 5), (2, 8), 6
MODES = {"greedy": 0.0, "T = 0.8": 0.8}


def answers(engine: Engine) -> list[list[int]]:
    """Prompts: chats over a generated document with earlier questions and their true answers, up to the last question."""
    sys.path.insert(0, str(ROOT / "examples"))
    from bundled_model.docqa.generate import Settings, conversations

    settings = Settings("values", "drafting", min_chars=600, max_chars=2400, turns=4)
    chats = [row["messages"] for row in conversations(settings, NUM_CHATS)]
    prompts = [[{key: message[key] for key in ("role", "content")} for message in chat[:-1]] for chat in chats]
    return [engine.tokenizer.render_chat(prompt).token_ids for prompt in prompts]


def texts(engine: Engine, pattern: str) -> list[list[int]]:
    """Prompts: the first tokens of the longest files."""
    paths = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_size)[-NUM_TEXTS:]
    return [engine.tokenizer.encode(path.read_text(encoding="utf-8"))[:PROMPT_TOKENS] for path in paths]


def tokens_per_forward(
    engine: Engine, prompts: list[list[int]], settings: Any, temperature: float, whole: bool
) -> float:
    """Tokens per forward, without the first token of each answer. All prompts have one salt that was not used before.

    whole: let an answer end by itself instead of after `NEW_TOKENS`.
    """
    tokens = forwards = 0
    salt = f"{settings} {temperature} {hash(tuple(map(tuple, prompts)))}"
    for seed, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=seed, ignore_eos=not whole)
        for event in engine.submit(prompt, sampling, plan=engine.plan(settings), salt=salt):
            if isinstance(event, TextDelta) and event.token_ids:
                forwards += 1
                tokens += len(event.token_ids)
    return (tokens - len(prompts)) / (forwards - len(prompts))


def table(engine: Engine, sets: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """Tokens per forward by drafter, then by text and mode."""
    speeds: dict[str, dict[str, float]] = {}
    for drafter in DRAFTERS:
        for name, prompts in sets.items():
            for mode, temperature in MODES.items():
                value = tokens_per_forward(engine, prompts, {drafter: {}}, temperature, name == "answers")
                speeds.setdefault(drafter, {})[f"{name}, {mode}"] = round(value, 2)
        print(drafter, speeds[drafter], flush=True)
    return speeds


def compression(engine: Engine, sets: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """Lookahead's tokens per forward by text, then by `W N G`, at temperature 0.8: greedy texts loop."""
    speeds: dict[str, dict[str, float]] = {}
    for name, prompts in sets.items():
        for window in WINDOWS:
            for ngram in NGRAMS:
                for candidates in CANDIDATES:
                    settings = {"lookahead": {"window": window, "ngram": ngram, "candidates": candidates}}
                    value = tokens_per_forward(engine, prompts[:NUM_COMPRESSED], settings, 0.8, name == "answers")
                    speeds.setdefault(name, {})[f"{window} {ngram} {candidates}"] = round(value, 2)
        print(f"lookahead {name}", speeds[name], flush=True)
    return speeds


def draw(speeds: dict[str, dict[str, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(speeds), len(CANDIDATES), figsize=(8, 2.4 * len(speeds)), layout="constrained", sharex=True, sharey="row"
    )
    for (name, values), row in zip(speeds.items(), axes, strict=True):
        row[0].set_ylabel(f"{name}: tokens a forward")
        for candidates, axis in zip(CANDIDATES, row, strict=True):
            for ngram in NGRAMS:
                points = [values[f"{window} {ngram} {candidates}"] for window in WINDOWS]
                axis.plot(WINDOWS, points, ".-", linewidth=1, label=f"N = {ngram}")
            axis.set_title(f"G = {candidates}", fontsize=10)
            axis.set_xscale("log", base=2)
    for axis in axes[-1]:
        axis.set(xlabel="window W", xticks=WINDOWS, xticklabels=WINDOWS)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def measure() -> dict[str, Any]:
    """The table of drafters, and lookahead for several W, N and G."""
    Governor._numbers = lambda governor, record, seqs, limits: list(limits)  # type: ignore[method-assign]
    with Engine("bundled", dtype="float32", plugins={}) as engine:
        sets = {
            "answers": answers(engine),
            "prose": texts(engine, "docs/*.md"),
            "code": texts(engine, "engine/**/*.py"),
        }
        return {"tokens_per_forward": table(engine, sets), "lookahead": compression(engine, sets)}


if __name__ == "__main__":
    measured = measure()
    if len(sys.argv) > 1:
        draw(measured["lookahead"], sys.argv[1])
    print(json.dumps(measured))
