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
from itertools import accumulate
from math import ceil
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from pitlane.engine.pacing.belief import CREDIT, FIRST_PAUSE, Belief, Drafting, Record
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.types import Draft, Sequence

if TYPE_CHECKING:
    from pitlane.engine.plan.plugin import Plugin

CALIBRATED = (2, 5, 9, 17, 33, 65)  # tokens of forwards that are timed before the first draft
FIRST_SIZE = 8  # tokens asked for, of one sequence a step, while it is unknown what the drafter gives and takes
PROBE_STEPS = 1  # steps with drafts of a drafter that the lane knows, and after a pause, before it may be paused
TRIAL_SIZE = 4  # tokens of a chain asked for on trial where none seem to pay
STANDS = 16  # tokens for which a drafter that found nothing is asked for as many again: nothing has changed
LONGEST_PAUSE = 1024  # tokens until the next probe; every probe that fails doubles them
MARGIN = 0.02  # tokens that a draft must promise beyond what its time is worth
CREDIT_PER_STEP = 0.01  # plain steps that a drafter may lose more with every step of the lane


class Parts(NamedTuple):
    """What might be drafted for sequence `place` of those that are asked for: at most `most` tokens; see `Belief.gains`."""

    place: int
    most: int
    drafting: Drafting
    gains: list[float]
    sizes: list[float]


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
        self.num_steps = 0
        self.step = Step()
        self._settled = self.step  # without drafts that are asked for and not there yet
        self._drafters: list[Plugin] = []  # that gave drafts for it

    def start_step(self, num_tokens: int, num_decoding: int) -> None:
        """Begin with a step of `num_tokens` scheduled tokens, which yields a token for each decoding sequence."""
        self.step = Step(num_tokens, num_decoding, num_tokens, num_decoding)
        self.num_steps += 1
        self._drafters.clear()

    @staticmethod
    def is_paused(seqs: SequenceOf[Sequence]) -> bool:
        """Whether no draft is wanted for any of these: then `ask` would say so too, at more cost."""
        return all(seq.drafting is not None and seq.drafting.is_paused(seq.num_tokens) for seq in seqs)

    def ask(self, drafter: Plugin, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        """How many tokens to draft for each sequence, at most `limits[i]` and 0 while paused."""
        record = self.records.get(drafter)
        if record is None:
            record = self.records[drafter] = Record(seen_steps=self.num_steps)
        record.earn(CREDIT_PER_STEP, self.num_steps)
        numbers = self._numbers(record, seqs, limits)
        record.turn += 1
        if not any(numbers):
            return numbers
        self._settled = replace(self.step)
        for index, (seq, number) in enumerate(zip(seqs, numbers, strict=True)):
            numbers[index] = number = max(0, min(number, self.max_step_tokens - self.step.num_tokens))
            if number:
                self._drafting(record, seq).reason = None
            if seq.drafting is not None:
                seq.drafting.asked = number
                self.step.add(seq.drafting.belief, number, number * record.per_token)
        return numbers

    def drafted(self, drafter: Plugin, seqs: SequenceOf[Sequence], seconds: float) -> None:
        """Take in the drafts that came and what they took; what did not come is not computed."""
        self.step = self._settled
        self.step.seconds += seconds
        number, reading = 0, False
        for seq in seqs:
            drafting = seq.drafting
            if drafting is None or not drafting.asked:
                continue
            if seq.draft is not None:
                self.step.add(drafting.belief, len(seq.draft.token_ids), 0.0)
                number += len(seq.draft.token_ids)
                reading, drafting.is_behind, drafting.stands_until = reading or drafting.is_behind, False, 0
            elif seq.num_tokens >= drafting.stands_until:
                drafting.stands_until = seq.num_tokens + STANDS
        record = self.records[drafter]
        if number:
            self._drafters.append(drafter)
        else:
            record.search_seconds.append(seconds)
            record.spend(self._search_cost(record))
        if number and not reading:
            record.draft_seconds.append(seconds / number)
        elif reading and self.clock.by_tokens:  # what is paid once is no price of a token, but it is time
            (plain,) = self._seconds(record, self.step.num_scheduled, [0])
            record.spend(max(0.0, seconds - number * record.per_token) / plain)

    def stepped(self, seconds: float) -> None:
        """Take in what a step of decoding took besides its forward, for the drafter if there was just one."""
        if len(self._drafters) == 1:
            self.records[self._drafters[0]].overheads.append(seconds - self.step.seconds)

    def verified_rows(self, drafter: Plugin, num_rows: int, seconds: float) -> None:
        """Take in what it took to draw a token for every row of its drafts, accepted or not."""
        self.records[drafter].row_seconds.append(seconds / num_rows)

    def verified(self, drafter: Plugin, seq: Sequence, draft: Draft, num_accepted: int) -> None:
        """Take in how one draft fared."""
        drafting, record, step = seq.drafting, self.records[drafter], self.step
        assert drafting is not None, "only who was asked has a draft"
        lost = 0.0
        if self.clock.by_tokens:
            plain, taken = self._seconds(record, step.num_scheduled, [0, len(draft.token_ids)])
            lost = taken / plain - 1 - num_accepted / step.num_decoding
        record.saw(draft, num_accepted, drafting.asked, lost)
        drafting.belief.saw(draft, num_accepted)
        drafting.steps_left = max(0, drafting.steps_left - 1)

    def _seconds(self, record: Record, num_tokens: int, sizes: SequenceOf[float]) -> list[float]:
        """Of a step over `num_tokens` and drafts of such sizes."""
        plain = self.clock.overhead
        drafted, per_token = max(plain, median(record.overheads or [0.0])), record.per_token
        forwards = self.clock.estimates(num_tokens + size for size in sizes)
        return [f + (drafted if size else plain) + size * per_token for f, size in zip(forwards, sizes, strict=True)]

    def _search_cost(self, record: Record) -> float:
        """The cost, in plain steps, of a search that finds no draft; 0 while the cost is unknown."""
        if not (record.per_search and self.clock.by_tokens):
            return 0.0
        (plain,) = self._seconds(record, self.step.num_scheduled, [0])
        return record.per_search / plain

    def _must_earn(self, record: Record, seq: Sequence) -> bool:
        """Pause a drafter whose searches find no draft and cost more than a step earns, until the next search is paid for."""
        cost = self._search_cost(record)
        if cost <= CREDIT_PER_STEP or record.credit >= min(cost, CREDIT):
            return False
        drafting = self._drafting(record, seq)
        wait = ceil((min(cost, CREDIT) - record.credit) / CREDIT_PER_STEP)
        drafting.resumes_at = max(drafting.resumes_at, seq.num_tokens + wait)
        work = f"{1e3 * record.per_search:.1f} ms a step, the time of {cost:.2f} plain steps"
        drafting.reason = f"its own work took {work}, and found no draft"
        return True

    @staticmethod
    def _drafting(record: Record, seq: Sequence) -> Drafting:
        if seq.drafting is None:
            seq.drafting = Drafting(record.belief.inherited(), record.steps_left or PROBE_STEPS)
        return seq.drafting

    def _numbers(self, record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        numbers = [0] * len(seqs)
        if not record.draft_seconds or not self.clock.by_tokens:
            place = self._first(record, seqs, limits)
            if self._must_earn(record, seqs[place]):
                return numbers
            is_chain = record.longest > 0 and not record.belief.is_tree
            numbers[place] = min(limits[place], TRIAL_SIZE if is_chain else FIRST_SIZE)
            return numbers
        parts: list[Parts] = []
        for index, (seq, limit) in enumerate(zip(seqs, limits, strict=True)):
            if limit <= 0:
                continue
            drafting = self._drafting(record, seq)
            if drafting.is_paused(seq.num_tokens):
                continue
            if drafting.reason:
                drafting.reason, drafting.steps_left, drafting.is_behind = None, PROBE_STEPS, True
            if seq.num_tokens < drafting.stands_until:
                numbers[index] = 0 if self._must_earn(record, seq) else min(limit, drafting.asked)
                continue
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
        found = [
            (gain / size, gain, size, part) for part in parts for gain, size in zip(part.gains, part.sizes, strict=True)
        ]
        found.sort(key=itemgetter(0), reverse=True)
        number = self._best(record, [gain for _, gain, _, _ in found], [size for _, _, size, _ in found])[0]
        for _, _, _, part in found[:number]:
            numbers[part.place] = part.most if part.drafting.belief.is_tree else numbers[part.place] + 1
            if not part.drafting.steps_left:
                part.drafting.pause = FIRST_PAUSE

    def _best(self, record: Record, gains: list[float], sizes: list[float]) -> tuple[int, int, float]:
        """How many of several parts to add to the step (0: none pays), how many are least bad, and their time in plain steps."""
        step = self.step
        plain, *seconds = [s + step.seconds for s in self._seconds(record, step.num_tokens, [0.0, *accumulate(sizes)])]
        speeds = [
            (1 + gain / step.num_expected) * plain / s for gain, s in zip(accumulate(gains), seconds, strict=True)
        ]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        pays = speeds[best] >= 1 + MARGIN / step.num_expected
        return (best + 1 if pays else 0), best + 1, seconds[best] / plain

    def _try(self, record: Record, parts: list[Parts], numbers: list[int], seqs: SequenceOf[Sequence]) -> None:
        """Pause what would not pay if it were alone in the step either, after a trial if there is one left and it can be paid."""
        credit = record.credit
        for part in parts:
            drafting = part.drafting
            pays, best, taken = self._best(record, part.gains, part.sizes)
            if pays:
                continue
            gains, sizes = list(accumulate(part.gains)), list(accumulate(part.sizes))
            wait = drafting.pause
            if drafting.steps_left:
                trial = min(best, TRIAL_SIZE)
                plain, seconds = self._seconds(record, self.step.num_scheduled, [0.0, sizes[trial - 1]])
                cost = seconds / plain - 1
                if credit >= min(cost, CREDIT):
                    credit -= cost
                    numbers[part.place] = part.most if drafting.belief.is_tree else trial
                    continue
                wait = ceil((min(cost, CREDIT) - credit) / CREDIT_PER_STEP)
            else:
                drafting.pause = min(2 * drafting.pause, LONGEST_PAUSE)
            drafting.reason = (
                f"drafts cost more than they saved (drafts of length {sizes[best - 1]:.0f} would add {gains[best - 1]:.2f} tokens "
                f"to the {self.step.num_expected:.2f} of a step, and make it as long as {taken:.2f} plain steps)"
            )
            drafting.resumes_at = seqs[part.place].num_tokens + wait
            drafting.belief = drafting.belief.inherited()
