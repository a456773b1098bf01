"""Perplexity of a long text with all tokens, with a window alone, and with attention sinks: python docs/sinks.py MODEL TEXT [N].

The model reads the first N tokens (3,072 by default) of a text file. The window has 512 tokens and moves in blocks of 32. Prints
the perplexity by stretches of 1,024 positions and, as the last line, one JSON document. `positions >= 1024` is the figure of
docs/exactness.md.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import torch

from pitlane import Draft, Engine, KVState

WINDOW, STRIDE, STEP, STRETCH = 512, 32, 64, 1024
SETTINGS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "window alone": {"attention_sinks": {"num_sinks": 0, "window": WINDOW, "stride": STRIDE}},
    "1 sink": {"attention_sinks": {"num_sinks": 1, "window": WINDOW, "stride": STRIDE}},
    "4 sinks": {"attention_sinks": {"num_sinks": 4, "window": WINDOW, "stride": STRIDE}},
}


def nats(engine: Engine, settings: dict[str, Any], token_ids: list[int]) -> list[float]:
    """Negative log-likelihood of every token but the first. A step is a known token and a draft of the tokens behind it."""
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
    lane.pool.release(kv)
    return result


def perplexity(values: list[float]) -> float:
    return round(exp(sum(values) / len(values)), 2)


def measure(model: str, text: str, num_tokens: int) -> dict[str, dict[str, float]]:
    """Perplexity by the name of a setting and by positions."""
    without_cache = {"plugins": lambda default: {k: v for k, v in default.items() if k != "prefix_cache"}}
    rows = {}
    with Engine(model, **without_cache) as engine:
        token_ids = engine.tokenizer.encode(text)[:num_tokens]
        for name, settings in SETTINGS.items():
            values = nats(engine, settings, token_ids)
            cuts = [*range(0, len(values), STRETCH), len(values)]
            row = {f"{low}-{high - 1}": perplexity(values[low:high]) for low, high in pairwise(cuts)}
            rows[name] = row | {"positions >= 1024": perplexity(values[STRETCH:] or values)}
            print(f"{name:14}", *(f"{place}: {value:8.2f} " for place, value in rows[name].items()))
    return rows


if __name__ == "__main__":
    model, path, *rest = sys.argv[1:]
    count = int(rest[0]) if rest else 3072
    result = measure(model, Path(path).read_text(encoding="utf-8"), count)
    print(json.dumps({"model": model, "text": Path(path).name, "tokens": count, "perplexity": result}))
