"""The governor: how many draft tokens to ask for, and when a drafter is better left alone.

A step that verifies K draft tokens yields 1 + the accepted ones and takes longer than a plain step, by drafting and by the wider
forward. The governor keeps both as running estimates (seconds by number of tokens, seconds per draft token, and
acceptance by drafter and sequence) and asks for the K with the most expected tokens per second. Where no K beats a plain step
the drafter is paused for this sequence, and probed again after ever longer stretches, so that it can cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from pitlane.engine.clock import StepClock
from pitlane.engine.types import Draft

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
PRIOR_ACCEPTED, PRIOR_TRIED = 1.5, 2.0  # what a new drafter is believed to do, as if it had been seen
DECAY = 0.9  # weight of what was seen before, per step with a draft
TRIAL_STEPS = 6  # steps with drafts before a drafter may be paused
PROBE_STEPS = 1
TRIAL_SIZE = 4  # tokens asked for on trial where none seem to pay
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # tokens until the next probe; doubled by every probe that fails
MARGIN = 1.02  # a draft must promise this much more than a plain step


@dataclass(slots=True)
class Drafting:
    """What one drafter has done for one sequence.

    accepted, tried: decayed counts of draft tokens tested, up to and including the first miss. gained, size: decayed means for
    trees, whose tokens are no chain.
    """

    accepted: float = PRIOR_ACCEPTED
    tried: float = PRIOR_TRIED
    gained: float | None = None
    size: float = 0.0
    longest: int = 0  # most tokens that the drafter is known to give; 0 is unknown
    steps_left: int = TRIAL_STEPS
    pause: int = FIRST_PAUSE
    resumes_at: int = 0  # token index of the next probe, while paused
    reason: str | None = None  # why it is paused
    asked: int = 0

    @property
    def rate(self) -> float:
        """Chance that a draft token is accepted if the one before it was."""
        return min(0.999, self.accepted / self.tried)

    def saw(self, draft: Draft, num_accepted: int) -> None:
        """Take in one verified draft."""
        number = len(draft.token_ids)
        self.longest = max(self.longest, number if number < self.asked else 2 * number)
        self.accepted = DECAY * self.accepted + num_accepted
        self.tried = DECAY * self.tried + min(num_accepted + 1, number)
        if draft.parents is not None:
            before = self.gained if self.gained is not None else float(num_accepted)
            self.gained = DECAY * before + (1 - DECAY) * num_accepted
            self.size = DECAY * (self.size or number) + (1 - DECAY) * number
        self.steps_left = max(0, self.steps_left - 1)

    def expected(self, number: int) -> float:
        """Tokens that a step with `number` draft tokens is expected to yield."""
        if self.gained is not None:
            return 1 + self.gained * min(1.0, number / self.size)
        rate = self.rate
        return float((1 - rate ** (number + 1)) / (1 - rate))


def choose(
    drafting: Drafting, drafter: str, clock: StepClock, num_other_tokens: int, limit: int, num_tokens: int
) -> int:
    """Return how many tokens to ask a drafter for: at most `limit`; 0 while it is paused.

    num_other_tokens: what the step computes anyway; num_tokens: known tokens of the sequence.
    """
    if limit <= 0 or (drafting.reason and num_tokens < drafting.resumes_at):
        return 0
    plain = clock.estimate(num_other_tokens)
    if plain is None:
        return limit
    if drafting.reason:
        drafting.reason, drafting.steps_left = None, PROBE_STEPS
    draft_rate = clock.per_draft_token(drafter)

    def speed(number: int) -> float:
        seconds = (clock.estimate(num_other_tokens + number) or plain) + number * draft_rate
        return drafting.expected(number) / seconds

    most = min(limit, drafting.longest or limit)
    drafting.asked = best = max((size for size in (*SIZES, most) if size <= most), key=speed)
    gain = speed(best) * plain
    if gain >= MARGIN:
        if not drafting.steps_left:
            drafting.pause = FIRST_PAUSE
        return best
    if drafting.steps_left:
        drafting.asked = min(best, TRIAL_SIZE)
        return drafting.asked
    drafting.reason = (
        f"{best} draft tokens were to yield {drafting.expected(best):.2f} tokens in the time of "
        f"{drafting.expected(best) / gain:.2f} plain steps"
    )
    drafting.resumes_at = num_tokens + drafting.pause
    drafting.pause = min(2 * drafting.pause, LONGEST_PAUSE)
    return 0
