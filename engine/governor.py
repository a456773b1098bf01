"""The governor: how many draft tokens to ask for, and when a drafter is better left alone.

A step with draft tokens yields the accepted ones more, and takes longer than a plain step, by drafting and by the wider forward.
The governor keeps both as running estimates, and asks for the draft tokens that are likeliest to be accepted, whichever sequence
they are for, as many as give the step the most expected tokens per second. Where no draft beats a plain step the drafter is
paused for this sequence, and probed again after ever longer stretches. What drafts lose is charged to the drafter, and trials
and probes must be paid for, so that it can cost next to nothing. What it did for other sequences is what a new one begins with.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pitlane.engine.belief import CREDIT, FIRST_PAUSE, Belief, Drafting, Record
from pitlane.engine.clock import StepClock
from pitlane.engine.types import Draft, Sequence

if TYPE_CHECKING:
    from pitlane.engine.plugin import Plugin

CALIBRATED = (2, 5, 9, 17, 33, 65)  # tokens of forwards that are timed before the first draft
FIRST_SIZE = 8  # tokens asked for, of one sequence a step, while it is unknown what the drafter gives and takes
PROBE_STEPS = 1  # steps with drafts of a drafter that the lane knows, and after a pause, before it may be paused
TRIAL_SIZE = 4  # tokens of a chain asked for on trial where none seem to pay
LONGEST_PAUSE = 1024  # tokens until the next probe; every probe that fails doubles them
MARGIN = 0.02  # tokens that a draft must promise beyond what its time is worth
CREDIT_PER_STEP = 0.01  # plain steps that a drafter may lose more with every step of the lane


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
        record = self.records[drafter]
        if number and not reading:
            record.draft_seconds.append(seconds / number)
        elif reading and self.clock.by_tokens:  # what is paid once is no price of a token, but it is time
            plain = float(self._seconds(record, self.step.num_scheduled, [0])[0])
            record.spend(max(0.0, seconds - number * record.per_token) / plain)

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
