"""The governor: how many draft tokens to ask for, and when to pause a drafter.

A step with draft tokens yields more tokens than a plain step, by the accepted draft tokens. It also takes longer, by the time of
drafting and by the wider forward. The governor keeps running estimates of both. It asks for those draft tokens, of any sequence,
that are most likely to be accepted, and for as many of them as give the step the most expected tokens per second.

Where no draft beats a plain step, the drafter is paused for the sequence, and probed again after longer and longer stretches. The
time that drafts lose is charged to the drafter, and a trial or a probe must be paid for, so a drafter that does not help costs
next to nothing. A new sequence begins with what the drafter did for other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil
from operator import itemgetter
from statistics import median
from typing import NamedTuple

from pitlane.engine.decode.draft import Draft
from pitlane.engine.pacing.belief import CREDIT, FIRST_PAUSE, Belief, Outlook, Record
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence

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
    outlook: Outlook
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


@dataclass(slots=True)
class Drafting:
    """What one drafter did in a step. Lists are by sequence; `Governor.ask` makes it, the loop fills it in.

    lengths: known tokens before the step. asked: draft tokens that were asked for. drafts: what came. seconds: of drafting.
    row_seconds: of drawing a token for every row of the drafts, where a plugin wants them. num_accepted: by sequence id, of the
    drafts that were verified.
    """

    drafter: Plugin
    seqs: SequenceOf[Sequence]
    lengths: list[int]
    asked: list[int]
    drafts: SequenceOf[Draft | None]
    seconds: float = 0.0
    num_rows: int = 0
    row_seconds: float = 0.0
    num_accepted: dict[int, int] = field(default_factory=dict)


class Governor:
    """The governor of one lane: `start_step`, `ask` for each plan with a drafter, and after the step `learn`."""

    def __init__(self, clock: StepClock, max_step_tokens: int) -> None:
        self.clock, self.max_step_tokens = clock, max_step_tokens
        self.records: dict[str, Record] = {}  # by plugin key, so that they outlive the plugin's instance
        self.num_steps = 0
        self.step = Step()

    def start_step(self, num_tokens: int, num_decoding: int) -> None:
        """Begin with a step of `num_tokens` scheduled tokens, which yields a token for each decoding sequence."""
        self.step = Step(num_tokens, num_decoding, num_tokens, num_decoding)
        self.num_steps += 1

    @staticmethod
    def is_paused(seqs: SequenceOf[Sequence]) -> bool:
        """Whether no draft is wanted for any of these: then `ask` would say so too, at more cost."""
        return all(seq.outlook is not None and seq.outlook.is_paused(seq.num_tokens) for seq in seqs)

    def ask(self, drafter: Plugin, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> Drafting:
        """How many tokens to draft for each sequence (`asked`): at most `limits[i]`, and 0 while the drafter is paused."""
        record = self.records.get(drafter.key)
        if record is None:
            record = self.records[drafter.key] = Record(seen_steps=self.num_steps)
        record.earn(CREDIT_PER_STEP, self.num_steps)
        numbers = self._numbers(record, seqs, limits)
        record.turn += 1
        for index, (seq, number) in enumerate(zip(seqs, numbers, strict=True)):
            numbers[index] = number = max(0, min(number, self.max_step_tokens - self.step.num_tokens))
            if number:
                outlook = self._outlook(record, seq)
                outlook.reason = None
                self.step.add(outlook.belief, number, number * record.per_token)
            if seq.outlook is not None:
                seq.outlook.asked = number
        return Drafting(drafter, seqs, [seq.num_tokens for seq in seqs], numbers, [None] * len(seqs))

    def learn(self, draftings: SequenceOf[Drafting], overhead: float | None) -> None:
        """Take in the drafts of a step and how they fared. overhead: seconds besides its forward, of a step without prompts."""
        step = self.step = Step(self.step.num_scheduled, self.step.num_decoding, self.step.num_scheduled)
        step.num_expected = float(step.num_decoding)
        step.seconds = sum(drafting.seconds for drafting in draftings)
        for drafting in draftings:
            self._learn_costs(drafting)
        for drafting in draftings:
            self._learn_gains(drafting)
        drafters = [drafting.drafter for drafting in draftings if any(drafting.drafts)]
        if len(drafters) == 1 and overhead is not None:
            self.records[drafters[0].key].overheads.append(overhead - step.seconds)

    def _learn_costs(self, drafting: Drafting) -> None:
        """The time that a draft token takes; drafts that did not come are not computed."""
        record, number, reading = self.records[drafting.drafter.key], 0, False
        for seq, length, asked, draft in zip(
            drafting.seqs, drafting.lengths, drafting.asked, drafting.drafts, strict=True
        ):
            outlook = seq.outlook
            if outlook is None or not asked:
                continue
            if draft is not None:
                self.step.add(outlook.belief, len(draft.token_ids), 0.0)
                number += len(draft.token_ids)
                reading, outlook.is_behind, outlook.stands_until = reading or outlook.is_behind, False, 0
            elif length >= outlook.stands_until:
                outlook.stands_until = length + STANDS
        if not number:
            record.search_seconds.append(drafting.seconds)
            record.spend(self._search_cost(record))
        elif not reading:
            record.draft_seconds.append(drafting.seconds / number)
        elif self.clock.by_tokens:  # reading a prompt first is paid once: it costs time, but is no price of a token
            (plain,) = self._seconds(record, self.step.num_scheduled, [0])
            record.spend(max(0.0, drafting.seconds - number * record.per_token) / plain)
        if drafting.num_rows:
            record.row_seconds.append(drafting.row_seconds / drafting.num_rows)

    def _learn_gains(self, drafting: Drafting) -> None:
        """How many tokens of the drafts were accepted, and the plain steps that the drafts lost or gained."""
        record, step = self.records[drafting.drafter.key], self.step
        for seq, asked, draft in zip(drafting.seqs, drafting.asked, drafting.drafts, strict=True):
            if draft is None or seq.outlook is None or seq.id not in drafting.num_accepted:
                continue
            num_accepted, lost = drafting.num_accepted[seq.id], 0.0
            if self.clock.by_tokens:
                plain, taken = self._seconds(record, step.num_scheduled, [0, len(draft.token_ids)])
                lost = taken / plain - 1 - num_accepted / step.num_decoding
            record.saw(draft, num_accepted, asked, lost)
            seq.outlook.belief.saw(draft, num_accepted)
            seq.outlook.steps_left = max(0, seq.outlook.steps_left - 1)

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
        outlook = self._outlook(record, seq)
        wait = ceil((min(cost, CREDIT) - record.credit) / CREDIT_PER_STEP)
        outlook.resumes_at = max(outlook.resumes_at, seq.num_tokens + wait)
        work = f"{1e3 * record.per_search:.1f} ms a step, the time of {cost:.2f} plain steps"
        outlook.reason = f"its own work took {work}, and found no draft"
        return True

    @staticmethod
    def _outlook(record: Record, seq: Sequence) -> Outlook:
        if seq.outlook is None:
            seq.outlook = Outlook(record.belief.inherited(), record.steps_left or PROBE_STEPS)
        return seq.outlook

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
            outlook = self._outlook(record, seq)
            if outlook.is_paused(seq.num_tokens):
                continue
            if outlook.reason:
                outlook.reason, outlook.steps_left, outlook.is_behind = None, PROBE_STEPS, True
            if seq.num_tokens < outlook.stands_until:
                numbers[index] = 0 if self._must_earn(record, seq) else min(limit, outlook.asked)
                continue
            most = min(limit, record.most)
            belief = outlook.belief.leaning(record.belief) if len(seqs) > 1 else outlook.belief
            parts.append(Parts(index, most, outlook, *belief.gains(most)))
        if parts:
            self._share(record, parts, numbers)
            self._try(record, [part for part in parts if not numbers[part.place]], numbers, seqs)
        return numbers

    @staticmethod
    def _first(record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> int:
        """Whose draft shall show what the drafter gives and takes: at best one that has no prompt to read first."""
        able = [index for index, limit in enumerate(limits) if limit > 0] or [0]
        ready = [index for index in able if (found := seqs[index].outlook) is not None and not found.is_behind]
        return ready[0] if ready else able[record.turn % len(able)]

    def _share(self, record: Record, parts: list[Parts], numbers: list[int]) -> None:
        """Take the parts that promise most per token, as many as are best for the step."""
        found = [
            (gain / size, gain, size, part) for part in parts for gain, size in zip(part.gains, part.sizes, strict=True)
        ]
        found.sort(key=itemgetter(0), reverse=True)
        number = self._best(record, [gain for _, gain, _, _ in found], [size for _, _, size, _ in found])[0]
        for _, _, _, part in found[:number]:
            numbers[part.place] = part.most if part.outlook.belief.is_tree else numbers[part.place] + 1
            if not part.outlook.steps_left:
                part.outlook.pause = FIRST_PAUSE

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
            outlook = part.outlook
            pays, best, taken = self._best(record, part.gains, part.sizes)
            if pays:
                continue
            gains, sizes = list(accumulate(part.gains)), list(accumulate(part.sizes))
            wait = outlook.pause
            if outlook.steps_left:
                trial = min(best, TRIAL_SIZE)
                plain, seconds = self._seconds(record, self.step.num_scheduled, [0.0, sizes[trial - 1]])
                cost = seconds / plain - 1
                if credit >= min(cost, CREDIT):
                    credit -= cost
                    numbers[part.place] = part.most if outlook.belief.is_tree else trial
                    continue
                wait = ceil((min(cost, CREDIT) - credit) / CREDIT_PER_STEP)
            else:
                outlook.pause = min(2 * outlook.pause, LONGEST_PAUSE)
            outlook.reason = (
                f"drafts cost more than they saved (drafts of length {sizes[best - 1]:.0f} would add {gains[best - 1]:.2f} tokens "
                f"to the {self.step.num_expected:.2f} of a step, and make it as long as {taken:.2f} plain steps)"
            )
            outlook.resumes_at = seqs[part.place].num_tokens + wait
            outlook.belief = outlook.belief.inherited()
