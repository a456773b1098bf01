"""The governor: how many draft tokens to ask for, and when a drafter is better left alone.

A step with draft tokens yields the accepted ones more, and takes longer than a plain step, by drafting and by the wider forward.
The governor keeps both as running estimates, and asks for the draft tokens that are likeliest to be accepted, whichever sequence
they are for, as many as give the step the most expected tokens per second. Where no draft beats a plain step the drafter is
paused for this sequence, and probed again after ever longer stretches. What drafts lose is charged to the drafter, and trials
and probes must be paid for, so that it can cost next to nothing. What it did for other sequences is what a new one begins with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pitlane.engine.clock import StepClock
from pitlane.engine.types import Draft, Sequence

if TYPE_CHECKING:
    from pitlane.engine.plugin import Plugin

LONGEST = 64  # tokens of a chain
CALIBRATED = (2, 5, 9, 17, 33, 65)  # tokens of forwards that are timed before the first draft
LEAN = 10.0  # tested tokens of other sequences that a sequence's belief leans on
PRIOR_RATE, PRIOR_STEPS = 0.75, 2.0  # what a new drafter is believed to do, as if it had been seen in so many steps
DECAY, LANE_DECAY = 0.9, 0.98  # weight of what was seen before, per draft: of one sequence, of all of a lane
FIRST_SIZE = 8  # tokens asked for, of one sequence a step, while it is unknown what the drafter gives and takes
TRIAL_STEPS = 6  # steps with drafts before a new drafter may be paused
PROBE_STEPS = 1  # the same for a drafter that the lane knows, and after a pause
TRIAL_SIZE = 4  # tokens of a chain asked for on trial where none seem to pay
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # tokens until the next probe; doubled by every probe that fails
MARGIN = 0.02  # tokens that a draft must promise beyond what its time is worth
CREDIT, CREDIT_PER_STEP = 3.0, 0.01  # plain steps that a drafter may lose for a lane: at once, and per step of the lane


@dataclass(slots=True)
class Belief:
    """What a drafter is expected to do, from decayed sums over the steps that it drafted for.

    accepted, tried: draft tokens that were tested, up to and including the first miss. gained, offered, num_drafts: accepted and
    all draft tokens of so many drafts, for drafters that give trees, whose tokens are no chain.
    """

    decay: float = DECAY
    accepted: float = PRIOR_RATE * PRIOR_STEPS
    tried: float = PRIOR_STEPS
    gained: float = 0.0
    offered: float = 0.0
    num_drafts: float = 0.0
    is_tree: bool = False

    @property
    def rate(self) -> float:
        """Chance that a token of a chain is accepted if the one before it was."""
        return min(0.999, self.accepted / self.tried)

    def saw(self, draft: Draft, num_accepted: int) -> None:
        """Take in one verified draft."""
        number = len(draft.token_ids)
        self.accepted = self.decay * self.accepted + num_accepted
        self.tried = self.decay * self.tried + min(num_accepted + 1, number)
        self.gained = self.decay * self.gained + num_accepted
        self.offered = self.decay * self.offered + number
        self.num_drafts = self.decay * self.num_drafts + 1
        self.is_tree = self.is_tree or draft.parents is not None

    def gains(self, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected accepted tokens of each part of a draft of `most` tokens, and the size of that part.

        The parts of a chain are its tokens; a tree is one part, as large as it was in the mean.
        """
        if self.is_tree:
            size = min(most, self.offered / self.num_drafts)
            return np.array([self.gained * size / self.offered]), np.array([size])
        numbers = np.arange(1, min(most, LONGEST) + 1)
        return np.power(self.rate, numbers, dtype=np.float64), np.ones(len(numbers))

    def expected(self, number: int) -> float:
        """Accepted tokens of a draft of so many."""
        return float(self.gains(number)[0].sum()) if number else 0.0

    def leaning(self, other: Belief) -> Belief:
        """The same, as if some of what others see had been seen too: few drafts, or unlucky ones, say little."""
        found = replace(self, accepted=self.accepted + LEAN * other.rate, tried=self.tried + LEAN)
        if other.num_drafts and self.num_drafts:
            share = PRIOR_STEPS / other.num_drafts
            found.gained += share * other.gained
            found.offered += share * other.offered
            found.num_drafts += PRIOR_STEPS
        return found

    def inherited(self) -> Belief:
        """The same, weighing no more than a prior: to begin with, or after a pause."""
        share = min(1.0, PRIOR_STEPS / self.num_drafts) if self.num_drafts else 0.0
        drafts = {name: share * getattr(self, name) for name in ("gained", "offered", "num_drafts")}
        return Belief(accepted=self.rate * PRIOR_STEPS, tried=PRIOR_STEPS, is_tree=self.is_tree, **drafts)


@dataclass(slots=True)
class Drafting:
    """One sequence and its drafter."""

    belief: Belief = field(default_factory=Belief)
    steps_left: int = TRIAL_STEPS  # on trial
    pause: int = FIRST_PAUSE
    resumes_at: int = 0  # token index of the next probe, while paused
    reason: str | None = None  # why it is paused
    asked: int = 0
    is_behind: bool = True  # a draft model has the sequence, or what was added in a pause, to read before it drafts


@dataclass(slots=True)
class Record:
    """What a drafter did for all sequences of a lane.

    longest: most tokens that it gave; is_longest: it was asked for more. credit: plain steps that it may lose. turn: whose draft
    shall show what it gives. Seconds are those per draft token of its last drafts: to make them, and to draw a token for each;
    drafts that had to read a prompt first are left out, since that is paid once.
    """

    belief: Belief = field(default_factory=lambda: Belief(decay=LANE_DECAY))
    steps_left: int = TRIAL_STEPS
    longest: int = 0
    is_longest: bool = False
    credit: float = CREDIT
    turn: int = 0
    draft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    row_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    @property
    def most(self) -> int:
        """Tokens that it might give; one more than it did, lest a text with short drafts should set the bound."""
        return self.longest + 1 if self.is_longest else 2 * self.longest

    @property
    def per_token(self) -> float:
        """Seconds of both together."""
        return sum(median_low(seconds) for seconds in (self.draft_seconds, self.row_seconds) if seconds)

    def saw(self, draft: Draft, num_accepted: int, num_asked: int, lost: float) -> None:
        """Take in one verified draft and the plain steps that it lost (gained, if negative)."""
        number = len(draft.token_ids)
        self.is_longest = number < num_asked or (self.is_longest and number <= self.longest)
        self.longest = max(self.longest, number)
        self.belief.saw(draft, num_accepted)
        self.steps_left = max(0, self.steps_left - 1)
        self.credit = max(-CREDIT, min(CREDIT, self.credit - lost))


class Parts(NamedTuple):
    """What might be drafted for sequence `place` of those that are asked for: at most `most` tokens; see `Belief.gains`."""

    place: int
    most: int
    drafting: Drafting
    gains: NDArray[np.float64]
    sizes: NDArray[np.float64]


@dataclass(slots=True)
class Step:
    """The step under way. num_tokens: computed, drafts so far included; num_expected: tokens it yields; seconds: of drafting."""

    num_scheduled: int = 0
    num_decoding: int = 0
    num_tokens: int = 0
    num_expected: float = 0.0
    seconds: float = 0.0

    def add(self, belief: Belief, number: int, seconds: float) -> None:
        """Add a draft of one sequence."""
        if number:
            self.num_tokens += number
            self.num_expected += belief.expected(number)
            self.seconds += seconds


class Governor:
    """Of one lane: `start_step`, then for each plan `ask` and `drafted`, then `verified` for each sequence."""

    def __init__(self, clock: StepClock, max_step_tokens: int) -> None:
        self.clock, self.max_step_tokens = clock, max_step_tokens
        self.records: WeakKeyDictionary[Plugin, Record] = WeakKeyDictionary()
        self.step = Step()
        self._settled = self.step  # without drafts that are asked for and not there yet

    def start_step(self, num_tokens: int, num_decoding: int) -> None:
        """Begin with a step of `num_tokens` scheduled tokens, which yields a token for each decoding sequence."""
        self.step = Step(num_tokens, num_decoding, num_tokens, num_decoding)
        for record in self.records.values():
            record.credit = min(CREDIT, record.credit + CREDIT_PER_STEP)

    def ask(self, drafter: Plugin, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        """How many tokens to draft for each sequence, at most `limits[i]` and 0 while paused."""
        record = self.records.setdefault(drafter, Record())
        self._settled, numbers = replace(self.step), []
        for seq, number in zip(seqs, self._numbers(record, seqs, limits), strict=True):
            number = max(0, min(number, self.max_step_tokens - self.step.num_tokens))
            if number:
                drafting = self._drafting(record, seq)
                drafting.asked = number
                self.step.add(drafting.belief, number, number * record.per_token)
            numbers.append(number)
        record.turn += 1
        return numbers

    def drafted(self, drafter: Plugin, seqs: SequenceOf[Sequence], seconds: float) -> None:
        """Take in the drafts that came and what they took; what did not come is not computed."""
        self.step = self._settled
        self.step.seconds += seconds
        number, reading = 0, False
        for seq in seqs:
            if seq.draft is not None and seq.drafting is not None:
                self.step.add(seq.drafting.belief, len(seq.draft.token_ids), 0.0)
                number += len(seq.draft.token_ids)
                reading, seq.drafting.is_behind = reading or seq.drafting.is_behind, False
        if number and not reading:
            self.records[drafter].draft_seconds.append(seconds / number)

    def verified_rows(self, drafter: Plugin, num_rows: int, seconds: float) -> None:
        """Take in what it took to draw a token for every row of its drafts, accepted or not."""
        self.records[drafter].row_seconds.append(seconds / num_rows)

    def verified(self, drafter: Plugin, seq: Sequence, draft: Draft, num_accepted: int) -> None:
        """Take in how one draft fared."""
        drafting, record, step = seq.drafting, self.records[drafter], self.step
        assert drafting is not None, "only who was asked has a draft"
        lost = 0.0
        if self.clock.by_tokens:
            plain, taken = self._seconds(record, step.num_scheduled, [0, len(draft.token_ids)]).tolist()
            lost = taken / plain - 1 - num_accepted / step.num_decoding
        record.saw(draft, num_accepted, drafting.asked, lost)
        drafting.belief.saw(draft, num_accepted)
        drafting.steps_left = max(0, drafting.steps_left - 1)

    def _seconds(self, record: Record, num_tokens: int, sizes: ArrayLike) -> NDArray[np.float64]:
        """Of a step over `num_tokens` and drafts of such sizes."""
        sizes = np.asarray(sizes)
        return self.clock.estimates(num_tokens + sizes) + self.clock.overhead + sizes * record.per_token

    @staticmethod
    def _drafting(record: Record, seq: Sequence) -> Drafting:
        if seq.drafting is None:
            seq.drafting = Drafting(record.belief.inherited(), record.steps_left or PROBE_STEPS)
        return seq.drafting

    def _numbers(self, record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        numbers = [0] * len(seqs)
        if not record.draft_seconds or not self.clock.by_tokens:
            place = self._first(record, seqs, limits)
            is_chain = record.longest > 0 and not record.belief.is_tree
            numbers[place] = min(limits[place], TRIAL_SIZE if is_chain else FIRST_SIZE)
            return numbers
        parts: list[Parts] = []
        for index, (seq, limit) in enumerate(zip(seqs, limits, strict=True)):
            if limit <= 0:
                continue
            drafting = self._drafting(record, seq)
            if drafting.reason and seq.num_tokens < drafting.resumes_at:
                continue
            if drafting.reason:
                drafting.reason, drafting.steps_left, drafting.is_behind = None, PROBE_STEPS, True
            most = min(limit, record.most)
            belief = drafting.belief.leaning(record.belief) if len(seqs) > 1 else drafting.belief
            parts.append(Parts(index, most, drafting, *belief.gains(most)))
        if parts:
            self._share(record, parts, numbers)
            self._try(record, [part for part in parts if not numbers[part.place]], numbers, seqs)
        return numbers

    @staticmethod
    def _first(record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> int:
        """Whose draft shall show what the drafter gives and takes: at best one that has no prompt to read first."""
        able = [index for index, limit in enumerate(limits) if limit > 0] or [0]
        ready = [index for index in able if (found := seqs[index].drafting) is not None and not found.is_behind]
        return ready[0] if ready else able[record.turn % len(able)]

    def _share(self, record: Record, parts: list[Parts], numbers: list[int]) -> None:
        """Take the parts that promise most per token, as many as are best for the step."""
        gains, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("gains", "sizes"))
        owners = np.repeat(np.arange(len(parts)), [len(part.gains) for part in parts])
        order = np.argsort(-gains / sizes, kind="stable")
        number = self._best(record, np.cumsum(gains[order]), np.cumsum(sizes[order]))[0]
        taken = np.bincount(owners[order[:number]], minlength=len(parts)).tolist()
        for part, count in zip(parts, taken, strict=True):
            if count:
                numbers[part.place] = part.most if part.drafting.belief.is_tree else count
                if not part.drafting.steps_left:
                    part.drafting.pause = FIRST_PAUSE

    def _best(self, record: Record, gains: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[int, int, float]:
        """Which of several drafts to add to the step, from 1 on (0: none), which is least bad, and its time in plain steps."""
        step = self.step
        plain, *_ = seconds = self._seconds(record, step.num_tokens, np.concatenate(([0.0], sizes))) + step.seconds
        speeds = (1 + gains / step.num_expected) * plain / seconds[1:]
        best = int(speeds.argmax())
        pays = speeds[best] >= 1 + MARGIN / step.num_expected
        return (best + 1 if pays else 0), best + 1, float(seconds[best + 1] / plain)

    def _try(self, record: Record, parts: list[Parts], numbers: list[int], seqs: SequenceOf[Sequence]) -> None:
        """Pause what would not pay if it were alone in the step either, after a trial if there is one left and it can be paid."""
        credit = record.credit
        for part in parts:
            drafting = part.drafting
            gains, sizes = np.cumsum(part.gains), np.cumsum(part.sizes)
            pays, best, taken = self._best(record, gains, sizes)
            if pays:
                continue
            wait = drafting.pause
            if drafting.steps_left:
                trial = min(best, TRIAL_SIZE)
                plain, seconds = self._seconds(record, self.step.num_scheduled, [0.0, sizes[trial - 1]])
                cost = float(seconds / plain) - 1
                if credit >= min(cost, CREDIT):
                    credit -= cost
                    numbers[part.place] = part.most if drafting.belief.is_tree else trial
                    continue
                wait = ceil((min(cost, CREDIT) - credit) / CREDIT_PER_STEP)
            else:
                drafting.pause = min(2 * drafting.pause, LONGEST_PAUSE)
            drafting.reason = (
                f"{sizes[best - 1]:.0f} draft tokens were to add {gains[best - 1]:.2f} to the {self.step.num_expected:.2f} "
                f"tokens of a step, in the time of {taken:.2f} plain steps"
            )
            drafting.resumes_at = seqs[part.place].num_tokens + wait
            drafting.belief = drafting.belief.inherited()
