"""The speed of verified drafts on a model of real size, and the cost of a drafter that is never right. Needs a quiet machine.

A steering plugin forces the text, and a drafter knows every token with a set probability. So acceptance is known, and the test
measures the loop, the wider forward and the governor. A token is a hash of the token before, so no other drafter guesses it.
Run with `pytest -m slow -s tests/speed`, which prints the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

from pitlane import Engine, SamplingParams
from pitlane.engine.plan.registry import PluginRegistry

pytestmark = pytest.mark.slow
MODEL = "random:llama-1b"
NUM_TOKENS, PROMPT = 96, list(range(100, 164))
TURN = 16  # tokens per turn, less than a second
PLUGINS = '''
from random import Random

from pydantic import Field

from pitlane import Draft, Plugin, PluginOptions, hookimpl


def forced(token, position):
    return Random(token << 16 | position).randrange(1000, 30000)


class Forced(Plugin):
    """Force a text: a token is a hash of the token before and of its position.

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
    """Draft the forced text; every token is right with a set probability.

    Changes in the loop: `propose`. Exactness: identical. Costs: nothing. Source: this test.
    """

    name, role, exactness = "scripted", "drafter", "identical"

    class Options(PluginOptions):
        acceptance: float = Field(0.8, description="probability that a draft token is right")
        num_draft_tokens: int = Field(4, description="tokens per draft")

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
    plain, drafted, steps, narrow, wide = [], [], [], [], []
    clock = engine.lane_of(engine.default_plan).pacing.clock  # its times of forwards come from these runs
    drafter = {"forced": {}, "scripted": {"acceptance": 0.8, "num_draft_tokens": number}}
    for _ in range(3):
        plain.append(seconds_per_token(engine, {"forced": {}})[0])
        narrow.append(clock.by_tokens[1])
        seconds, result = seconds_per_token(engine, drafter)
        drafted.append(seconds)
        wide.append(clock.by_tokens[number + 1])
        steps.append((NUM_TOKENS - 1) / (result.stats["steps"] - 1))
        assert all(token != 7 for token in result.token_ids)
    cost = median(wide) / median(narrow)
    speed_up, predicted = median(plain) / median(drafted), median(steps) / cost
    forward = f"a forward of {number + 1} takes {1e3 * median(wide):.0f} ms ({cost:.2f} of a forward of 1)"
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


@dataclass
class Turn:
    """Consecutive steps of one of the two sequences."""

    drafts: bool
    seconds: float = 0.0
    tokens: int = 0


class Turns:
    """Two sequences of one lane, plain and with drafts, in turns of `TURN` tokens, so that both meet the same drift of the machine.

    Steps that read prompts count for neither.
    """

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns = [Turn(drafts=False)]
        self.scheduler = engine.lane_of(engine.default_plan).scheduler
        self.schedule, self.step, self.active = self.scheduler.schedule, engine.loop.step, None
        monkeypatch.setattr(self.scheduler, "schedule", self._schedule)
        monkeypatch.setattr(engine.loop, "step", self._step)

    def _schedule(self) -> list[Any]:
        scheduled, self.active = self.schedule(), None
        if not scheduled or not all(seq.is_decoding for seq in self.scheduler.seqs):
            return scheduled
        sides = {seq.plan.drafter is not None: seq for seq in scheduled}
        turn = self.turns[-1]
        if turn.drafts not in sides or (turn.tokens >= TURN and len(sides) > 1):
            self.turns.append(turn := Turn(not turn.drafts))
        for seq in scheduled:
            seq.num_scheduled_tokens = int(seq is sides[turn.drafts])
        self.active = sides[turn.drafts]
        self.num_tokens_before = self.active.num_tokens
        return [self.active]

    def _step(self) -> None:
        started = perf_counter()
        self.step()
        if self.active is not None:
            self.turns[-1].seconds += perf_counter() - started
            self.turns[-1].tokens += self.active.num_tokens - self.num_tokens_before

    @property
    def pairs(self) -> list[tuple[Turn, Turn]]:
        pairs = list(zip(self.turns[::2], self.turns[1::2], strict=False))
        assert all(drafted.drafts and not plain.drafts for plain, drafted in pairs)
        return pairs


def _speed(pairs: list[tuple[Turn, Turn]]) -> float:
    plain, drafted = (sum(t.seconds for t in side) / sum(t.tokens for t in side) for side in zip(*pairs, strict=True))
    return plain / drafted


def by_turns(
    engine: Engine, sampling: SamplingParams, common: dict[str, Any], drafter: dict[str, Any]
) -> tuple[float, float]:
    """The speed of a request with a drafter over a request without, and the share of accepted draft tokens.

    Runs twice; the other side begins the second time.

    Prints the speed with a 95 % bootstrap interval over pairs of turns.
    """
    plans, pairs, drafts, accepted = [engine.plan(common), engine.plan(common | drafter)], [], 0, 0
    for plan in plans:
        engine.lane_of(plan)
    for user, order in enumerate((plans, plans[::-1])):
        with pytest.MonkeyPatch.context() as patch:
            turns = Turns(engine, patch)
            # a salt per round: no drafter remembers the answers of the first round
            streams = [engine.submit(PROMPT, sampling, plan=plan, salt=str(user)) for plan in order]
            first, second = (stream.result() for stream in streams)
        assert first.token_ids == second.token_ids and len(first.token_ids) == sampling.max_tokens
        pairs += turns.pairs
        drafts += first.stats["draft_tokens"] + second.stats["draft_tokens"]
        accepted += first.stats["accepted_tokens"] + second.stats["accepted_tokens"]
    generator = Random(0)
    speeds = sorted(_speed(generator.choices(pairs, k=len(pairs))) for _ in range(2000))
    speed, share = _speed(pairs), accepted / max(1, drafts)
    name, interval = ", ".join(drafter), f"{speeds[50]:.3f} to {speeds[-51]:.3f}"
    print(
        f"\n{name}: {drafts} drafted, {share:.1%} accepted, speed {speed:.3f} ({interval}) over {len(pairs)} pairs of turns"
    )
    return speed, share


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_that_is_never_right_costs_next_to_nothing(engine: Engine, name: str) -> None:
    """512 tokens that no drafter can guess, with drafts and without, in turns in one process."""
    sampling = SamplingParams(max_tokens=512, ignore_eos=True)
    speed, share = by_turns(engine, sampling, engine.default_plan.settings | {"forced": {}}, {name: DRAFTERS[name]})
    assert share < 0.02
    assert speed >= 0.97


@pytest.mark.parametrize("name", DRAFTERS)
def test_nor_does_it_cost_a_small_model(name: str) -> None:
    """Noise of the bundled model, some of which can be guessed. A token takes 1.4 ms, so every microsecond of a drafter shows."""
    sampling = SamplingParams(max_tokens=1024, ignore_eos=True, temperature=2.0, seed=1)
    with Engine("bundled") as engine:
        speed, _ = by_turns(engine, sampling, engine.default_plan.settings, {name: {}})
    assert speed >= 0.95
