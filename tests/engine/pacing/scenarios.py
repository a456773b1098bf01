"""Drafters and machines that pacing meets, for the tests and the ablation. A simulated lane serves each scenario."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tests.engine.pacing.simulator import Drafter, FixedLength, Lane, Machine

FIXED = (0, 1, 2, 3, 4, 6, 9, 16, 28)  # draft lengths that pacing is compared with


@dataclass(frozen=True)
class Scenario:
    """A machine, drafters that sequences take in turn, and the load: `num_tokens` in answers of `length`.

    `num_seqs` sequences run side by side in every step; an answer that ends makes room for the next.
    """

    machine: Machine
    drafters: tuple[Drafter | None, ...]
    num_seqs: int = 1
    length: int = 512
    num_tokens: int = 1536
    num_prompt_tokens: int = 0
    is_calibrated: bool = True

    def run(self, pacing: Any = None, seed: int = 0) -> Lane:
        drafters = [drafter and replace(drafter) for drafter in self.drafters]
        lane = Lane(self.machine, drafters, pacing, seed, is_calibrated=self.is_calibrated)
        return lane.stream(self.num_tokens, self.num_seqs, self.length, self.num_prompt_tokens)

    def seconds(self, make_pacing: Callable[[], Any] = lambda: None, num_seeds: int = 2) -> float:
        """Plain steps that a token takes, the mean over seeds."""
        lanes = [self.run(make_pacing(), seed) for seed in range(num_seeds)]
        return sum(lane.seconds for lane in lanes) / sum(lane.num_new_tokens for lane in lanes)

    def plain_seconds(self, num_seeds: int = 2) -> float:
        return self.seconds(lambda: FixedLength(0), num_seeds)

    def best_seconds(self, num_seeds: int = 2, lengths: tuple[int, ...] = FIXED) -> float:
        """Seconds a token with the best fixed draft length; a length of 0 is plain steps."""
        return min(self.seconds(partial(FixedLength, number), num_seeds) for number in lengths)


def turns(before: float, after: float, at: int) -> Callable[[int], float]:
    """An acceptance rate that changes once in an answer."""
    return lambda place: before if place < at else after


def alternates(first: float, second: float, period: int) -> Callable[[int], float]:
    return lambda place: first if place // period % 2 == 0 else second


def in_stretches(share: float, period: int) -> Callable[[int], bool]:
    """A search that finds a draft in a share of the text, in stretches, as a lookup in the prompt does."""
    return lambda place: place % period < share * period


def nowhere(place: int) -> bool:
    return False


def changes(factor: float, at: int) -> Callable[[int], float]:
    """A machine whose forwards take `factor` times as long from a step on."""
    return lambda step: factor if step >= at else 1.0


TREE = Drafter(0.1, longest=28, is_tree=True)
LOSERS = {
    "never right, cheap": Scenario(Machine(0.02), (Drafter(0.0),)),
    "never right": Scenario(Machine(0.1), (Drafter(0.0, 0.01),)),
    "never right, dear": Scenario(Machine(0.5), (Drafter(0.0, 0.1),)),
    "seldom right, slow": Scenario(Machine(0.02), (Drafter(0.1, 0.15),)),
    "right at times, slow": Scenario(Machine(0.05), (Drafter(0.3, 0.3),)),
    "right, slower than steps": Scenario(Machine(0.05), (Drafter(0.7, 1.5, per_known_token=0.02),)),
    "tree never right": Scenario(Machine(0.1), (replace(TREE, rate=0.02, per_token=0.01),)),
    "never right, 16 seqs": Scenario(Machine(0.02), (Drafter(0.0, 0.01),), 16, num_tokens=5000),
    "right at times, 16 seqs": Scenario(Machine(0.07, free=16), (Drafter(0.3, 0.1),), 16, num_tokens=5000),
    "tree never right, 16 seqs": Scenario(Machine(0.05), (replace(TREE, rate=0.0),), 16, num_tokens=5000),
    "never right, short answers": Scenario(Machine(0.1), (Drafter(0.0, 0.05),), length=48),
    "draft model, never right": Scenario(Machine(0.1), (Drafter(0.0, 0.1, per_known_token=0.02),)),
    "draft model, short answers": Scenario(Machine(0.1), (Drafter(0.1, 0.1, per_known_token=0.02),), length=48),
    "never right, noise": Scenario(Machine(0.1, noise=0.2, spikes=0.02), (Drafter(0.05, 0.02),)),
    "never right, overhead": Scenario(Machine(0.02, overhead=0.2, draft_overhead=0.3), (Drafter(0.15),)),
    "never right, not calibrated": Scenario(Machine(0.1), (Drafter(0.0, 0.02),), is_calibrated=False),
    "short drafts, dear steps": Scenario(Machine(0.02, draft_overhead=2.5), (Drafter(0.95, longest=2),)),
    "slow rows": Scenario(Machine(0.02), (Drafter(0.3, per_row=0.2),)),
    "search 0.05, no draft": Scenario(Machine(), (Drafter(has_draft=nowhere, search=0.05),)),
    "search 0.5, no draft": Scenario(Machine(), (Drafter(has_draft=nowhere, search=0.5, index=5.0),)),
    "search 10, no draft": Scenario(Machine(), (Drafter(has_draft=nowhere, search=10.0),)),
    "search 0.5, rare drafts": Scenario(Machine(), (Drafter(0.5, has_draft=in_stretches(0.05, 200), search=0.5),)),
}
WINNERS = {
    "right, cheap": Scenario(Machine(0.01), (Drafter(0.9),)),
    "right": Scenario(Machine(0.02), (Drafter(0.9, 0.1),)),
    "mostly right": Scenario(Machine(0.02), (Drafter(0.7, 0.05),)),
    "half right": Scenario(Machine(0.05), (Drafter(0.6),)),
    "nearly always right": Scenario(Machine(0.005), (Drafter(0.98, 0.01),)),
    "always right, long": Scenario(Machine(0.002), (Drafter(0.995, longest=28),)),
    "always right, longer": Scenario(Machine(0.002), (Drafter(0.999, longest=400),), length=1600, num_tokens=6000),
    "short drafts, 16 seqs": Scenario(Machine(0.001), (Drafter(0.97, longest=4),), 16, num_tokens=5000),
    "right, slow rows": Scenario(Machine(0.01), (Drafter(0.8, per_row=0.1),)),
    "right, dear tokens": Scenario(Machine(0.1), (Drafter(0.8, 0.02),)),
    "half right, small gain": Scenario(Machine(0.1), (Drafter(0.5, 0.1),)),
    "tree": Scenario(Machine(0.02), (TREE,)),
    "tree, 4 seqs": Scenario(Machine(0.01), (TREE,), 4, num_tokens=3000),
    "draft model": Scenario(Machine(0.02), (Drafter(0.8, 0.1, per_known_token=0.1),)),
    "right, 16 seqs": Scenario(Machine(0.01), (Drafter(0.8),), 16, num_tokens=5000),
    "right, 16 seqs, free 32": Scenario(Machine(0.05, free=32), (Drafter(0.8, 0.01),), 16, num_tokens=5000),
    "draft model, 16 seqs": Scenario(
        Machine(0.01, free=16), (Drafter(0.9, 0.01, per_known_token=0.01),), 16, num_tokens=5000
    ),
    "right, short answers": Scenario(Machine(0.03), (Drafter(0.8, 0.05),), length=48),
    "right, noise": Scenario(Machine(0.05, noise=0.2, spikes=0.02), (Drafter(0.75, 0.05),)),
    "right, slow moments": Scenario(Machine(0.05, noise=0.1, spikes=0.05), (Drafter(0.7, 0.05),)),
    "right, slow moments, 8 seqs": Scenario(
        Machine(0.02, free=8, noise=0.1, spikes=0.05), (Drafter(0.7, 0.02),), 8, num_tokens=3000
    ),
    "right, overhead": Scenario(Machine(0.02, overhead=0.3, draft_overhead=0.2), (Drafter(0.8),)),
    "right, not calibrated": Scenario(Machine(0.05), (Drafter(0.8, 0.05),), is_calibrated=False),
    "right, machine slower": Scenario(Machine(0.05, pace=changes(2.0, 150)), (Drafter(0.7, 0.1),)),
    "right, machine faster": Scenario(Machine(0.05, pace=changes(0.4, 150)), (Drafter(0.7, 0.05),)),
    "free tokens": Scenario(Machine(0.3, free=6), (Drafter(0.7),)),
}
MIXED = {
    "turns bad": Scenario(Machine(0.05), (Drafter(turns(0.9, 0.0, 200), 0.05),)),
    "turns good": Scenario(Machine(0.05), (Drafter(turns(0.0, 0.9, 200), 0.05),)),
    "turns good, late": Scenario(Machine(0.05), (Drafter(turns(0.0, 0.9, 1000), 0.05),), length=2000, num_tokens=4000),
    "alternates, 50": Scenario(Machine(0.05), (Drafter(alternates(0.9, 0.05, 50), 0.05),)),
    "alternates, 200": Scenario(
        Machine(0.05), (Drafter(alternates(0.05, 0.9, 200), 0.05),), length=800, num_tokens=2400
    ),
    "lookup": Scenario(Machine(0.05), (Drafter(0.8, has_draft=in_stretches(0.3, 60), search=0.004),)),
    "lookup, slow index": Scenario(
        Machine(0.05), (Drafter(0.9, has_draft=in_stretches(0.5, 60), search=0.004, index=20.0),), length=800
    ),
    "lookup, slow search": Scenario(
        Machine(0.05), (Drafter(0.9, has_draft=in_stretches(0.3, 200), search=0.1, index=2.0),), length=800
    ),
    "lookup, 8 seqs": Scenario(
        Machine(0.05, free=8), (Drafter(0.8, has_draft=in_stretches(0.3, 60), search=0.02),), 8, num_tokens=4000
    ),
    "texts differ": Scenario(Machine(0.05), (Drafter(0.9, 0.02, name="x"), Drafter(0.1, 0.02, name="x")), 1, 200),
    "texts differ, 8 seqs": Scenario(
        Machine(0.04), (Drafter(0.95, name="x"), Drafter(0.1, name="x")), 8, num_tokens=4000
    ),
    "two drafters": Scenario(
        Machine(0.03, free=4), (Drafter(0.9, 0.01, name="a"), Drafter(0.2, 0.1, name="b")), 4, num_tokens=3000
    ),
    "lookup beside a draft model": Scenario(
        Machine(0.1, free=2),
        (Drafter(0.9, has_draft=in_stretches(0.1, 100)), Drafter(0.8, 0.05, name="b")),
        2,
        num_tokens=2000,
    ),
    "drafter beside plain": Scenario(Machine(0.03, free=4), (Drafter(0.8, 0.01), None, None), 6, num_tokens=4000),
    "machine slower, then a winner": Scenario(Machine(0.2, pace=changes(3.0, 200)), (Drafter(0.4, 0.2),)),
    "machine faster, then a winner": Scenario(Machine(0.05, pace=changes(3.0, 0)), (Drafter(0.5, 0.2),)),
    "pace drifts": Scenario(
        Machine(0.03, spikes=0.01, pace=lambda step: 1.0 + 0.5 * (step // 60 % 2)), (Drafter(0.7, 0.1),)
    ),
    "dearer with the text": Scenario(
        Machine(0.1, pace=lambda step: 1.0 + step / 500), (Drafter(0.6, 0.15),), length=1500
    ),
    "prompts beside": Scenario(Machine(0.03, free=4), (Drafter(0.8, 0.02),), 4, 128, 3000, num_prompt_tokens=300),
    "prompts beside, slow moments": Scenario(
        Machine(0.03, free=4, noise=0.1, spikes=0.05), (None,), 4, 128, 3000, num_prompt_tokens=300
    ),
    "prompts beside a loser": Scenario(
        Machine(0.03, free=4), (Drafter(0.05, 0.02),), 4, 128, 3000, num_prompt_tokens=300
    ),
}
SCENARIOS = LOSERS | WINNERS | MIXED
