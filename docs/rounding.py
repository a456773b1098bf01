"""What 8 bits lose, by the way of rounding: change of the loss per token with its standard error, and KL to the exact model.

    python docs/rounding.py FILE:SKIP:WINDOWS ... [--model NAME] [--window N] [--variants NAME ...]

WINDOWS windows of a text are read, from character SKIP on. The plugin `rounded` rounds weights and inputs in torch, so the table
also has roundings that no kernel computes. Everything else is float32. All variants see the same tokens. The change of a token's
loss is paired with the exact model; the standard error takes the tokens as independent. Prints a table, then one JSON document.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pitlane import (
    BuildContext,
    EmbeddingPart,
    Engine,
    LinearPart,
    LinearPlan,
    Part,
    Plugin,
    PluginOptions,
    PluginRegistry,
    SamplingParams,
    Tensors,
    hookimpl,
)
from pitlane.ui.bench.quality import AllRows

ROW, NONE = 0, -1  # sizes of a group: a scale per row; not rounded
VARIANTS: dict[str, dict[str, Any]] = {
    "weights by row, inputs g64 (int8)": {"rounded": {}},
    "weights by row, inputs g128": {"rounded": {"inputs": 128}},
    "weights by row, inputs g32": {"rounded": {"inputs": 32}},
    "weights by row, inputs g64; head not rounded": {"rounded": {"head": False}},
    "weights by row": {"rounded": {"inputs": NONE}},
    "weights by row; head not rounded": {"rounded": {"inputs": NONE, "head": False}},
    "weights g32, inputs g32 (as Q8_0)": {"rounded": {"weights": 32, "inputs": 32}},
    "weights g64": {"rounded": {"weights": 64, "inputs": NONE}},
    "weights g64; head not rounded": {"rounded": {"weights": 64, "inputs": NONE, "head": False}},
    "weights by row, with gptq": {"gptq": {"bits": 8, "group_size": 0, "activations": "bfloat16"}},
}


class Rounded(Plugin):
    """Rounds weights and inputs of linears to 8 bits, in torch."""

    name, role, exactness = "rounded", "linear", "approximate"

    class Options(PluginOptions):
        weights: int = ROW
        inputs: int = 64
        head: bool = True

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors) -> Tensors | None:
        if not isinstance(part, (LinearPart, EmbeddingPart)) or not self._covers(part):
            return None
        return {**tensors, "weight": rounded(tensors["weight"].float(), self.options.weights)}

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        if not self._covers(part) or self.options.inputs == NONE:
            return None
        return LinearPlan(4 * part.num_values, 8 * part.num_values, partial(_built, self.options.inputs))

    def _covers(self, part: LinearPart | EmbeddingPart) -> bool:
        is_inner = isinstance(part, LinearPart) and part.fed_by is not None
        return is_inner or bool(self.options.head)


def _built(size: int, members: list[Tensors]) -> Any:
    weight = torch.cat([member["weight"].float() for member in members])
    return lambda x: torch.nn.functional.linear(rounded(x, size), weight)


def rounded(x: Tensor, size: int) -> Tensor:
    """Round the rows of x [M, K] in groups of `size` to whole numbers in [-127, 127] times a scale."""
    size = size or x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scales = (groups.abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scales).round() * scales).flatten(1)[:, : x.shape[1]]


def windows(engine: Engine, places: list[str], size: int) -> list[list[int]]:
    """The windows of FILE:SKIP:WINDOWS."""
    made = []
    for place in places:
        path, skip, count = place.rsplit(":", 2)
        text = Path(path).read_text(encoding="utf-8")[int(skip) :][: 12 * size * int(count)]
        ids = engine.tokenizer.encode(text, add_special_tokens=False)[: size * int(count)]
        made += [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return made


class Tables:
    """The log-probabilities [T, V] behind the tokens of a window, under one plan."""

    def __init__(self, engine: Engine, settings: dict[str, Any]) -> None:
        self.engine, self.rows = engine, AllRows()
        self.plan = engine.planner.extended(engine.plan(settings), self.rows)
        self.salt = json.dumps(settings)
        engine.lane_of(self.plan)  # before `is_on`: a new lane runs forwards of its own

    def table(self, ids: list[int]) -> Tensor:
        self.rows.is_on, self.rows.pieces = True, []
        self.engine.generate(ids, SamplingParams(max_tokens=1), plan=self.plan, salt=self.salt)
        self.rows.is_on = False
        table = torch.cat(self.rows.pieces)
        assert len(table) == len(ids), "every token of the window has a row"
        return table[:-1].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="FILE:SKIP:WINDOWS")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    registry = PluginRegistry.load()
    registry.add(Rounded)
    results = []
    print("| variant | change of the loss | KL |\n|---|---|---|")
    with Engine(options.model, plugins={}, dtype="float32", registry=registry) as engine:
        texts = windows(engine, options.places, options.window)
        plain = Tables(engine, {})
        exact = [plain.table(ids) for ids in texts]
        for name in options.variants:
            variant, changes, divergences = Tables(engine, VARIANTS[name]), [], []
            for ids, first in zip(texts, exact, strict=True):
                table, targets = variant.table(ids), torch.tensor(ids[1:])[:, None]
                changes.append((first - table).gather(1, targets).double())
                divergences.append((first.exp() * (first - table)).sum(1).double())
            change, divergence = torch.cat(changes), float(torch.cat(divergences).mean())
            mean, error = float(change.mean()), float(change.std()) / sqrt(len(change))
            print(f"| {name} | {100 * mean:+.2f} % (error {100 * error:.2f}) | {divergence:.4f} |", flush=True)
            results.append({"variant": name, "change": mean, "error": error, "kl": divergence, "tokens": len(change)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
