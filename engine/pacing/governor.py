"""The governor: how many draft tokens to ask for, and when to pause a drafter.

A step with draft tokens yields more tokens than a plain step, by the accepted draft tokens. It also takes longer, by the time of
drafting and by the wider forward. The governor keeps running estimates of both. It asks for those draft tokens, of any sequence,
that are most likely to be accepted, and for as many of them as give the step the most expected tokens per second.

Where no draft beats a plain step, the drafter is paused for the sequence, and tried again after the pause. The time that drafts
lose is charged to the drafter, and a trial must be paid for, so a drafter that does not help costs next to nothing. A new sequence
begins with what the drafter did for other sequences. Comments at constants say what tests/engine/pacing/ablation.py measures.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from operator import itemgetter
from statistics import median
from typing import NamedTuple

from pitlane.engine.pacing.belief import CREDIT, Outlook, Record
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.pacing.drafting import Drafting
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence

CALIBRATED = (2, 5, 9, 17, 33, 65)  # tokens of forwards that are timed before the first draft; off: batches 15 % slower
TRIAL_SIZE = 8  # draft tokens of a trial; 4: good drafters are 0.3 % slower; 16: other drafters cost 0.5 % more
PAUSE = 64  # tokens; 32 or 128: within 0.8 %; 1024: drafters that turn good are 50 % slower
REPEAT = 16  # tokens for which a search without a draft is repeated as it is; off: `ask` takes 4 times as long there
MARGIN = 0.02  # tokens that a draft must promise beyond the worth of its time; 0: 0.5 %, 0.1: 1.2 % slower
CREDIT_PER_STEP = 0.01  # plain steps that a drafter may lose with each step; half: 0.9 % slower where texts change


class Candidate(NamedTuple):
    """A possible draft for the sequence in `place` of the list, of at most `limit` tokens; see `Belief.gains`."""

    place: int
    limit: int
    outlook: Outlook
    gains: list[float]
    sizes: list[float]


@dataclass(slots=True)
class Step:
    """The step under way.

    num_scheduled, num_decoding: tokens and decoding sequences without drafts. num_tokens, num_expected, seconds: tokens to
    compute, tokens to gain and time of drafting, with the drafts so far.
    """

    num_scheduled: int = 0
    num_decoding: int = 0
    num_tokens: int = 0
    num_expected: float = 0.0
    seconds: float = 0.0


class Governor:
    """The governor of one lane: `start_step`, then `ask` and `add` for each plan with a drafter, and after the step `learn`.

    fixed: a draft length to ask for in every step, so that a check does not depend on times; None = the best length.
    """

    def __init__(self, clock: StepClock, max_step_tokens: int) -> None:
        self.clock, self.max_step_tokens = clock, max_step_tokens
        self.records: dict[str, Record] = {}  # by plugin key: a record outlives the plugin's instance
        self.num_steps = 0
        self.step = Step()
        self.fixed: int | None = None

    def start_step(self, num_tokens: int, num_decoding: int) -> None:
        """Begin with a step of `num_tokens` scheduled tokens, which yields a token for each decoding sequence."""
        self.step = Step(num_tokens, num_decoding, num_tokens, num_decoding)
        self.num_steps += 1

    @staticmethod
    def is_paused(seqs: SequenceOf[Sequence]) -> bool:
        """Whether the drafter is paused for all of these sequences. `ask` would say the same, at more cost."""
        return all(seq.outlook is not None and seq.outlook.is_paused(seq.num_tokens) for seq in seqs)

    def ask(self, drafter: Plugin, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> Drafting:
        """How many tokens to draft for each sequence (`asked`): at most `limits[i]`, and 0 while the drafter is paused."""
        record = self.records.get(drafter.key)
        if record is None:
            record = self.records[drafter.key] = Record(earned_steps=self.num_steps)
        record.earn(CREDIT_PER_STEP, self.num_steps)
        numbers = self._numbers(record, seqs, limits)
        record.num_asks += 1
        room = self.max_step_tokens - self.step.num_tokens
        for index, seq in enumerate(seqs):
            numbers[index] = number = max(0, min(numbers[index], room))
            room -= number
            if number:
                outlook = self._outlook(record, seq)
                outlook.reason = None
                if seq.num_tokens >= outlook.repeats_until:
                    outlook.asked = number
        return Drafting(drafter, seqs, [seq.num_tokens for seq in seqs], numbers, [None] * len(seqs))

    def add(self, drafting: Drafting) -> None:
        """Add the drafts that came to the step, before the next drafter is asked."""
        self.step.seconds += drafting.seconds
        for seq, draft in zip(drafting.seqs, drafting.drafts, strict=True):
            if draft is not None and seq.outlook is not None:
                self.step.num_tokens += len(draft.token_ids)
                self.step.num_expected += seq.outlook.belief.expected(len(draft.token_ids))

    def learn(self, draftings: SequenceOf[Drafting], overhead: float | None) -> None:
        """Learn from the drafts of a step. overhead: seconds besides drafts and forward; None for a step with prompts."""
        for drafting in draftings:
            self._learn_costs(drafting)
        for drafting in draftings:
            self._learn_gains(drafting)
        drafters = [drafting.drafter for drafting in draftings if any(drafting.drafts)]
        if len(drafters) == 1 and overhead is not None:
            self.records[drafters[0].key].overheads.append(overhead)

    def _learn_costs(self, drafting: Drafting) -> None:
        record, num_drafted, has_read = self.records[drafting.drafter.key], 0, False
        for seq, length, asked, draft in zip(
            drafting.seqs, drafting.lengths, drafting.asked, drafting.drafts, strict=True
        ):
            outlook = seq.outlook
            if outlook is None or not asked:
                continue
            if draft is not None:
                num_drafted += len(draft.token_ids)
                has_read, outlook.has_unread, outlook.repeats_until = has_read or outlook.has_unread, False, 0
            elif length >= outlook.repeats_until:
                outlook.repeats_until = length + REPEAT
        if not num_drafted:
            record.search_seconds.append(drafting.seconds)
            record.credit -= self._search_cost(record)  # all of it, for the cost is a median
        elif not has_read:
            record.draft_seconds.append(drafting.seconds / num_drafted)
        elif self.clock.by_tokens:  # the drafter read a prompt first, once: that costs time, but is no price of a token
            (plain,) = self._seconds(record, self.step.num_scheduled, [0])
            record.spend(max(0.0, drafting.seconds - num_drafted * record.per_token) / plain)
        if drafting.num_rows:
            record.row_seconds.append(drafting.row_seconds / drafting.num_rows)

    def _learn_gains(self, drafting: Drafting) -> None:
        record, step = self.records[drafting.drafter.key], self.step
        for seq, asked, draft in zip(drafting.seqs, drafting.asked, drafting.drafts, strict=True):
            if draft is None or seq.outlook is None or seq.id not in drafting.num_accepted:
                continue
            num_accepted, num_lost = drafting.num_accepted[seq.id], 0.0
            if self.clock.by_tokens:
                plain, taken = self._seconds(record, step.num_scheduled, [0, len(draft.token_ids)])
                num_lost = taken / plain - 1 - num_accepted / step.num_decoding
            record.update(draft, num_accepted, asked, num_lost)
            seq.outlook.belief.update(draft, num_accepted)
            seq.outlook.has_trial = False

    # ---- times

    def _seconds(self, record: Record, num_tokens: int, sizes: SequenceOf[float]) -> list[float]:
        """Seconds of steps over `num_tokens` and drafts of such sizes."""
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

    # ---- decisions

    def _numbers(self, record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        if self.fixed is not None:
            return [min(limit, self.fixed) for limit in limits]
        if not record.draft_seconds or not self.clock.by_tokens:
            return self._first_numbers(record, seqs, limits)
        numbers = [0] * len(seqs)
        candidates: list[Candidate] = []
        for index, (seq, limit) in enumerate(zip(seqs, limits, strict=True)):
            if limit <= 0:
                continue
            outlook = self._outlook(record, seq)
            if outlook.is_paused(seq.num_tokens):
                continue
            if outlook.reason:
                outlook.reason, outlook.has_trial = None, True
            if seq.num_tokens < outlook.repeats_until:
                numbers[index] = 0 if self._pause_search(record, seq) else min(limit, outlook.asked)
                continue
            limit = min(limit, record.max_draft)
            belief = outlook.belief.blended(record.belief) if len(seqs) > 1 else outlook.belief
            candidates.append(Candidate(index, limit, outlook, *belief.gains(limit)))
        if candidates:
            self._choose(record, candidates, numbers)
            rest = [candidate for candidate in candidates if not numbers[candidate.place]]
            self._try_or_pause(record, rest, numbers, seqs)
        return numbers

    def _first_numbers(self, record: Record, seqs: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        """A trial of one sequence, in turn, until the time of a draft token is known.

        A sequence that the drafter has read goes first: its next draft shows the time. Off: 15 % slower with 16 sequences.
        """
        numbers = [0] * len(seqs)
        allowed = [index for index, limit in enumerate(limits) if limit > 0]
        if allowed:
            outlooks = {index: seqs[index].outlook for index in allowed}
            read = [index for index, outlook in outlooks.items() if outlook is not None and not outlook.has_unread]
            index = read[0] if read else allowed[record.num_asks % len(allowed)]
            if not self._pause_search(record, seqs[index]):
                numbers[index] = min(limits[index], TRIAL_SIZE)
        return numbers

    def _choose(self, record: Record, candidates: list[Candidate], numbers: list[int]) -> None:
        """Take the parts of drafts that promise most per token, as many as are best for the step."""
        parts = [
            (gain / size, gain, size, candidate)
            for candidate in candidates
            for gain, size in zip(candidate.gains, candidate.sizes, strict=True)
        ]
        parts.sort(key=itemgetter(0), reverse=True)
        num_parts = self._best(record, [gain for _, gain, _, _ in parts], [size for _, _, size, _ in parts])[0]
        for _, _, _, candidate in parts[:num_parts]:
            is_tree = candidate.outlook.belief.is_tree
            numbers[candidate.place] = candidate.limit if is_tree else numbers[candidate.place] + 1

    def _best(self, record: Record, gains: list[float], sizes: list[float]) -> tuple[int, int, float]:
        """Return how many parts to add to the step, or 0 if no number pays; the best number; its time in plain steps."""
        step = self.step
        plain, *seconds = [s + step.seconds for s in self._seconds(record, step.num_tokens, [0.0, *accumulate(sizes)])]
        speeds = [
            (1 + gain / step.num_expected) * plain / s for gain, s in zip(accumulate(gains), seconds, strict=True)
        ]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        pays = speeds[best] >= 1 + MARGIN / step.num_expected
        return (best + 1 if pays else 0), best + 1, seconds[best] / plain

    def _try_or_pause(
        self, record: Record, candidates: list[Candidate], numbers: list[int], seqs: SequenceOf[Sequence]
    ) -> None:
        """For sequences whose draft would not pay even alone in the step: a trial if one is left and paid for, else a pause."""
        credit = record.credit
        for candidate in candidates:
            outlook = candidate.outlook
            pays, best, taken = self._best(record, candidate.gains, candidate.sizes)
            if pays:
                continue
            gains, sizes = list(accumulate(candidate.gains)), list(accumulate(candidate.sizes))
            wait = PAUSE
            if outlook.has_trial:
                size = min(best, TRIAL_SIZE)
                plain, seconds = self._seconds(record, self.step.num_scheduled, [0.0, sizes[size - 1]])
                cost = seconds / plain - 1
                if credit >= min(cost, CREDIT):
                    credit -= cost
                    numbers[candidate.place] = candidate.limit if outlook.belief.is_tree else size
                    continue
                wait = _steps_to_earn(min(cost, CREDIT) - credit)
            outlook.pause(
                f"drafts cost more than they saved (drafts of length {sizes[best - 1]:.0f} would add {gains[best - 1]:.2f} tokens "
                f"to the {self.step.num_expected:.2f} of a step, and make it as long as {taken:.2f} plain steps)",
                seqs[candidate.place].num_tokens + wait,
            )
            outlook.belief = outlook.belief.inherited()

    def _pause_search(self, record: Record, seq: Sequence) -> bool:
        """Pause a drafter whose searches find no draft and cost more than a step earns, until the next search is paid for."""
        cost = self._search_cost(record)
        if cost <= CREDIT_PER_STEP or record.credit >= min(cost, CREDIT):
            return False
        outlook = self._outlook(record, seq)
        work = f"{1e3 * record.per_search:.1f} ms a step, the time of {cost:.2f} plain steps"
        resumes_at = seq.num_tokens + _steps_to_earn(min(cost, CREDIT) - record.credit)
        outlook.pause(f"its own work took {work}, and found no draft", max(outlook.resumes_at, resumes_at))
        return True

    @staticmethod
    def _outlook(record: Record, seq: Sequence) -> Outlook:
        if seq.outlook is None:
            seq.outlook = Outlook(record.belief.inherited())
        return seq.outlook


def _steps_to_earn(credit: float) -> int:
    return ceil(credit / CREDIT_PER_STEP)
