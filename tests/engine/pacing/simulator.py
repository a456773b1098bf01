"""A simulated lane: sequences, drafters and a machine with a formula for step times. `Pacing` decides, as in the real loop.

Nothing here takes time: seconds are numbers. A plain forward over one token takes 1 second, so all times read as plain steps.
Chance is fixed by seeds. Whether a draft token is right depends on its place in the text alone, so two runs with the same seed
serve the same texts, however long the drafts are. The simulator knows `Pacing` by the calls that the loop makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from pitlane import Draft
from pitlane.engine.events import StepStats
from pitlane.engine.pacing.drafting import Drafting
from pitlane.engine.pacing.governor import CALIBRATED
from pitlane.engine.pacing.pacing import Pacing

PROMPT = 100  # known tokens of a sequence before its answer


@dataclass
class Machine:
    """Times of one lane, in plain steps.

    slope: of each token of a forward beyond `free` tokens. overhead: of a step besides its forward. draft_overhead,
    prompt_overhead: more of a step with drafts, with a prompt. noise: spread of every time. spikes: share of steps that take
    8 times as long. pace: factor on forwards, by step.
    """

    slope: float = 0.05
    free: int = 1
    overhead: float = 0.0
    draft_overhead: float = 0.0
    prompt_overhead: float = 0.0
    noise: float = 0.05
    spikes: float = 0.0
    pace: Callable[[int], float] = lambda step: 1.0

    def forward(self, num_tokens: int) -> float:
        """Seconds of a forward without noise, at pace 1."""
        return 1.0 + self.slope * max(0, num_tokens - self.free)


@dataclass(eq=False)
class Drafter:
    """Gives drafts of up to `longest` tokens.

    rate: chance that a draft token is right, by its place in the answer. A tree has `longest` nodes, and a share `rate` of them is
    accepted. has_draft: whether a search finds a draft, by the place in the answer. per_token: seconds of a draft token. search:
    seconds of a call, index: of the first call. per_known_token: seconds to read a known token, as draft models must. per_row: of
    drawing a token for a row.
    """

    rate: float | Callable[[int], float] = 0.8
    per_token: float = 0.0
    longest: int = 16
    is_tree: bool = False
    has_draft: Callable[[int], bool] = lambda place: True
    search: float = 0.0
    index: float = 0.0
    per_known_token: float = 0.0
    per_row: float = 0.0
    name: str = "drafter"

    @property
    def key(self) -> str:
        return self.name

    def rate_at(self, place: int) -> float:
        return self.rate(place) if callable(self.rate) else self.rate


@dataclass(eq=False)
class Seq:
    """What pacing sees of a sequence, and its text: a token at place `i` is drafted right where `draws[i]` is below the rate."""

    id: int
    plan: Any
    length: int
    draws: list[float]
    num_prompt_tokens: int = 0  # not computed yet
    num_tokens: int = PROMPT
    num_scheduled_tokens: int = 0
    num_read_tokens: int = 0  # by the drafter
    outlook: Any = None
    drafting: Any = None
    draft: Draft | None = None

    @property
    def place(self) -> int:
        """Tokens of the answer so far."""
        return self.num_tokens - PROMPT

    @property
    def is_decoding(self) -> bool:
        return self.num_prompt_tokens == 0

    def num_right(self, drafter: Drafter, draft: Draft) -> int:
        """How many tokens of a draft the target accepts."""
        number, place = len(draft.token_ids), self.place
        if drafter.is_tree:
            return int(number * drafter.rate_at(place) + self.draws[place])
        for index in range(number):
            if self.draws[place + index] >= drafter.rate_at(place + index):
                return index
        return number


@dataclass
class Step:
    """One step of a run. Dictionaries are by sequence id; `places`: tokens of the answer before the step."""

    seconds: float
    num_tokens: int
    num_prompt_tokens: int
    places: dict[int, int]
    asked: dict[int, int]
    drafted: dict[int, int]
    accepted: dict[int, int]


class FixedLength(Pacing):
    """Always asks for the same number of draft tokens."""

    def __init__(self, number: int) -> None:
        super().__init__(512)
        self.number = number

    def before(self, seqs: SequenceOf[Any], draft_limit: Callable[[Any], int]) -> Iterator[Drafting]:
        draftings: dict[int, Drafting] = {}
        for seq in [seq for seq in seqs if seq.is_decoding and seq.plan.drafter is not None and self.number]:
            if id(seq.plan) not in draftings:
                draftings[id(seq.plan)] = Drafting(seq.plan.drafter, [], [], [], [])
            drafting = draftings[id(seq.plan)]
            drafting.seqs, drafting.asked = [*drafting.seqs, seq], [*drafting.asked, min(self.number, draft_limit(seq))]
        yield from draftings.values()

    def after(self, stats: StepStats, draftings: SequenceOf[Drafting]) -> None:
        self.clock.record(stats.num_tokens, stats.num_prompt_tokens, stats.forward_seconds)
        self.budget.took(stats.num_prompt_tokens, stats.forward_seconds)


@dataclass
class Lane:
    """A lane and its sequences. Sequences take the drafters in turn; `steps` is what happened, `seconds` the time of all steps."""

    machine: Machine
    drafters: SequenceOf[Drafter | None]
    pacing: Any = None
    seed: int = 0
    max_step_tokens: int = 512
    draft_limit: int = 512
    is_calibrated: bool = True
    seqs: list[Seq] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    num_added: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.pacing = self.pacing or Pacing(self.max_step_tokens)
        self.plans = [SimpleNamespace(drafter=drafter) for drafter in self.drafters]
        self.random = Random(self.seed)
        for number in (*[512] * 3, *(CALIBRATED if self.is_calibrated else ())):  # prompts, then the sizes of drafts
            self.pacing.clock.record(number, number, self.noisy(self.machine.forward(number)))

    def noisy(self, seconds: float) -> float:
        """A time as it is measured."""
        return seconds * self.random.uniform(1 - self.machine.noise, 1 + self.machine.noise)

    def add(self, length: int, num_prompt_tokens: int = 0) -> Seq:
        """Add a sequence with an answer of `length` tokens."""
        draws = Random(1000 * self.seed + self.num_added)
        plan = self.plans[self.num_added % len(self.plans)]
        seq = Seq(self.num_added, plan, length, [draws.random() for _ in range(length + 80)], num_prompt_tokens)
        self.num_added += 1
        self.seqs.append(seq)
        return seq

    def serve(self, num_answers: int, length: int, num_seqs: int = 1, num_prompt_tokens: int = 0) -> Lane:
        """Answer so many requests, `num_seqs` of them side by side. An answer that ends makes room for the next request."""
        left = num_answers
        while left or self.seqs:
            while left and len(self.seqs) < num_seqs:
                self.add(length, num_prompt_tokens)
                left -= 1
            self.step()
        return self

    def stream(self, num_tokens: int, num_seqs: int = 1, length: int = 512, num_prompt_tokens: int = 0) -> Lane:
        """Decode `num_tokens` in all, with `num_seqs` sequences in every step."""
        while self.num_new_tokens < num_tokens:
            while len(self.seqs) < num_seqs:
                self.add(length, num_prompt_tokens)
            self.step()
        return self

    def limit(self, seq: Seq) -> int:
        """Draft tokens that the length of the answer leaves."""
        return min(self.draft_limit, seq.length - seq.place - 1)

    def step(self) -> None:
        """Run one step as the loop does."""
        seqs = self._schedule()
        draftings = []
        for drafting in self.pacing.before(seqs, self.limit):
            drafting.seconds = self._draft(drafting)
            draftings.append(drafting)
        num_draft = sum(len(seq.draft.token_ids) for seq in seqs if seq.draft)
        num_prompt = sum(seq.num_scheduled_tokens for seq in seqs if not seq.is_decoding)
        num_tokens = num_draft + sum(seq.num_scheduled_tokens for seq in seqs)
        forward = self.noisy(self.machine.forward(num_tokens)) * self.machine.pace(len(self.steps))
        forward *= 8.0 if self.random.random() < self.machine.spikes else 1.0
        besides = self.machine.overhead + (self.machine.draft_overhead if num_draft else 0.0)
        besides += self.machine.prompt_overhead if num_prompt else 0.0
        seconds = forward + (self.noisy(besides) if besides else 0.0)
        places = {seq.id: seq.place for seq in seqs if seq.is_decoding}
        drafted = {seq.id: len(seq.draft.token_ids) for seq in seqs if seq.draft}
        self._verify(seqs, draftings)
        seconds += sum(drafting.seconds + drafting.row_seconds for drafting in draftings)
        accepted = {seq_id: number for drafting in draftings for seq_id, number in drafting.num_accepted.items()}
        stats = StepStats(len(seqs), num_tokens, num_prompt, num_draft, sum(accepted.values()), forward, seconds)
        self.pacing.after(stats, draftings)
        asked = {seq.id: number for d in draftings for seq, number in zip(d.seqs, d.asked, strict=True) if number}
        self.steps.append(Step(seconds, num_tokens, num_prompt, places, asked, drafted, accepted))
        self.seconds += seconds
        self.seqs = [seq for seq in self.seqs if seq.place < seq.length]

    def _schedule(self) -> list[Seq]:
        """A token of every decoding sequence, and as much of the prompts as the budget allows."""
        decoding = [seq for seq in self.seqs if seq.is_decoding]
        for seq in decoding:
            seq.num_scheduled_tokens = 1
        left = self.pacing.prompt_tokens(len(decoding), bool(decoding), self.max_step_tokens - len(decoding))
        for seq in [seq for seq in self.seqs if not seq.is_decoding]:
            seq.num_scheduled_tokens = min(left, seq.num_prompt_tokens)
            left -= seq.num_scheduled_tokens
        return [seq for seq in self.seqs if seq.num_scheduled_tokens]

    def _draft(self, drafting: Any) -> float:
        """Fill in the drafts of one drafter; their seconds."""
        drafter, drafts, seconds = drafting.drafter, [], drafting.drafter.search + drafting.drafter.index
        drafter.index = 0.0
        for seq, asked in zip(drafting.seqs, drafting.asked, strict=True):
            number = min(asked, drafter.longest) if drafter.has_draft(seq.place) else 0
            seq.draft = Draft([0] * number, [-1] * number if drafter.is_tree else None) if number > 0 else None
            drafts.append(seq.draft)
            if number > 0:
                seconds += number * drafter.per_token + (seq.num_tokens - seq.num_read_tokens) * drafter.per_known_token
                seq.num_read_tokens = seq.num_tokens
        drafting.drafts = drafts
        return self.noisy(seconds) if seconds else 0.0

    def _verify(self, seqs: list[Seq], draftings: list[Any]) -> None:
        """Accept the draft tokens that are right, and move the sequences on."""
        for drafting in draftings:
            num_rows = sum(1 + len(draft.token_ids) for draft in drafting.drafts if draft)
            if num_rows and drafting.drafter.per_row:
                drafting.num_rows, drafting.row_seconds = num_rows, self.noisy(num_rows * drafting.drafter.per_row)
            for seq, draft in zip(drafting.seqs, drafting.drafts, strict=True):
                if draft is not None:
                    drafting.num_accepted[seq.id] = seq.num_right(drafting.drafter, draft)
        accepted = {seq_id: number for drafting in draftings for seq_id, number in drafting.num_accepted.items()}
        for seq in seqs:
            if seq.is_decoding:
                self.num_new_tokens += 1 + accepted.get(seq.id, 0)
                seq.num_tokens += 1 + accepted.get(seq.id, 0)
            else:
                seq.num_prompt_tokens -= seq.num_scheduled_tokens
            seq.draft, seq.num_scheduled_tokens = None, 0
