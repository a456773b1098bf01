"""Speed of verified drafts on a real size, and that a drafter which does not pay costs nothing. Needs a quiet machine.

The text is forced (a steering plugin) and the drafter knows it, with a set chance per token, so acceptance is exact: what is
measured is the loop, the wider forward and the governor. Each token follows from the one before, so that nobody else guesses it.
Run with `pytest -m slow -s tests/speed`, which prints the tables.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch

from pitlane import Engine, SamplingParams
from pitlane.engine.registry import PluginRegistry

pytestmark = pytest.mark.slow
MODEL = "random:llama-1b"
NUM_TOKENS, PROMPT = 96, list(range(100, 164))
PLUGINS = '''
from random import Random

from pydantic import Field

from pitlane import Draft, Plugin, PluginOptions, hookimpl


def forced(token, position):
    return Random(token << 16 | position).randrange(1000, 30000)


class Forced(Plugin):
    """Force a text whose every token follows from the one before it.

    Changes in the loop: `adjust_logits` raises one token. Exactness: steering. Costs: nothing. Source: this test.
    """

    name, exactness = "forced", "steering"

    @hookimpl
    def adjust_logits(self, rows):
        for row, index in enumerate(rows.seq_index):
            path = [*rows.seqs[index].token_ids, *rows.path(row)]
            rows.logits[row, forced(path[-1], len(path))] = 1e4
        return rows.logits


class Scripted(Plugin):
    """Draft the forced text, each token right with a set chance.

    Changes in the loop: `propose`. Exactness: identical. Costs: nothing. Source: this test.
    """

    name, role, exactness = "scripted", "drafter", "identical"

    class Options(PluginOptions):
        acceptance: float = Field(0.8, description="chance that a token is right")
        num_draft_tokens: int = Field(4, description="tokens a draft")

    @hookimpl
    def propose(self, seqs, limits):
        drafts = []
        for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True):
            rng = Random(seq.num_tokens * 7919)
            path = list(seq.token_ids)
            for _ in range(min(limit, self.options.num_draft_tokens)):
                path.append(forced(path[-1], len(path)) if rng.random() < self.options.acceptance else 7)
            drafts.append(Draft(path[seq.num_tokens:]) if len(path) > seq.num_tokens else None)
        return drafts
'''


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, without_cache: Any) -> Any:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "drafting.py").write_text(PLUGINS)
    registry = PluginRegistry.load(folder)
    with Engine(MODEL, dtype="bfloat16", plugins=without_cache, context=2048, threads=2, registry=registry) as made:
        yield made
    torch.set_num_threads(1)


def seconds_per_token(engine: Engine, settings: dict[str, Any], num_tokens: int = NUM_TOKENS) -> tuple[float, Any]:
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    result = engine.generate(PROMPT, sampling, plan=engine.plan(engine.default_plan.settings | settings))
    return result.stats["decode_ms"] / 1e3 / (num_tokens - 1), result


@pytest.mark.parametrize("number", [2, 4, 8, 16])
def test_speed_up_is_what_acceptance_and_the_wider_forward_predict(engine: Engine, number: int) -> None:
    plain, drafted, steps, one, wider = [], [], [], [], []
    clock = engine.lane_of(engine.default_plan).clock  # what the forwards of these very runs take
    drafter = {"forced": {}, "scripted": {"acceptance": 0.8, "num_draft_tokens": number}}
    for _ in range(3):
        plain.append(seconds_per_token(engine, {"forced": {}})[0])
        one.append(clock.by_tokens[1])
        seconds, result = seconds_per_token(engine, drafter)
        drafted.append(seconds)
        wider.append(clock.by_tokens[number + 1])
        steps.append((NUM_TOKENS - 1) / (result.stats["steps"] - 1))
        assert all(token != 7 for token in result.token_ids)
    cost = median(wider) / median(one)
    speed_up, predicted = median(plain) / median(drafted), median(steps) / cost
    forward = f"a forward of {number + 1} takes {1e3 * median(wider):.0f} ms ({cost:.2f} of one of 1)"
    tokens = f"{1e3 * median(plain):.0f} and {1e3 * median(drafted):.0f} ms a token"
    print(
        f"\nK={number}: {median(steps):.2f} tokens a step, {forward}, predicted {predicted:.2f}x, {speed_up:.2f}x: {tokens}"
    )
    assert speed_up >= 0.9 * predicted


DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {},
    "jacobi": {},
    "lookahead": {},
    "self_speculation": {"num_layers": 2},
    "speculative": {"model": "random:llama-1b-draft"},
}


@pytest.fixture(scope="module")
def plain_runs() -> list[float]:
    """Seconds per token of the plain runs so far: each is the one before a drafter and the one after another."""
    return []


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_that_is_never_right_costs_next_to_nothing(
    engine: Engine, plain_runs: list[float], name: str
) -> None:
    """512 tokens that nothing can guess, plain before and after."""
    if not plain_runs:
        plain_runs.append(seconds_per_token(engine, {"forced": {}}, 512)[0])
    seconds, result = seconds_per_token(engine, {"forced": {}, name: DRAFTERS[name]}, 512)
    plain_runs.append(seconds_per_token(engine, {"forced": {}}, 512)[0])
    ratios, stats = sorted(plain / seconds for plain in plain_runs[-2:]), result.stats
    share = stats["accepted_tokens"] / max(1, stats["draft_tokens"])
    print(
        f"\n{name}: {stats['draft_tokens']} drafted, {share:.1%} accepted, speed {sum(ratios) / 2:.3f} "
        f"({ratios[0]:.3f} and {ratios[1]:.3f}), {stats['paused']}"
    )
    assert share < 0.02
    assert sum(ratios) / 2 >= 0.97
