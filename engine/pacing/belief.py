"""What is known of drafters: of one for a sequence, and of one for all sequences of a lane. Numbers; `Governor` decides."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat
from math import log
from operator import mul
from statistics import median_low

from pitlane.engine.decode.draft import Draft

LONGEST = 64  # tokens of a chain
LEAST = 0.01  # chance of acceptance that a token of a chain is worth a thought
LEAN = 10.0  # tested tokens of other sequences that a sequence's belief leans on
PRIOR_RATE, PRIOR_STEPS = 0.75, 2.0  # what a new drafter is believed to do, as if it had been seen in so many steps
DECAY, LANE_DECAY = 0.9, 0.98  # weight of what was seen before, per draft: of one sequence, of all of a lane
TRIAL_STEPS = 6  # steps with drafts before a new drafter may be paused
FIRST_PAUSE = 32  # tokens until a drafter that was paused is probed
CREDIT = 3.0  # plain steps that a drafter may lose for a lane at once


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

    def gains(self, most: int) -> tuple[list[float], list[float]]:
        """Expected accepted tokens of each part of a draft of `most` tokens, and the size of that part.

        The parts of a chain are its tokens, less those that are hardly ever accepted; a tree is one part, of the mean size.
        """
        if self.is_tree:
            size = min(most, self.offered / self.num_drafts)
            return [self.gained * size / self.offered], [size]
        number = min(most, LONGEST, 1 + int(log(LEAST, self.rate)) if self.rate > LEAST else 1)
        return list(accumulate(repeat(self.rate, number), mul)), [1.0] * number

    def expected(self, number: int) -> float:
        """Accepted tokens of a draft of so many."""
        if not number:
            return 0.0
        if self.is_tree:
            return self.gains(number)[0][0]
        return self.rate * (1 - self.rate**number) / (1 - self.rate)

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
class Outlook:
    """What pacing expects of the drafter on one sequence."""

    belief: Belief = field(default_factory=Belief)
    steps_left: int = TRIAL_STEPS  # on trial
    pause: int = FIRST_PAUSE
    resumes_at: int = 0  # token index of the next probe, while paused
    reason: str | None = None  # why it is paused
    asked: int = 0
    stands_until: int = 0  # token index up to which it is asked for as many again
    is_behind: bool = True  # a draft model has the sequence, or what was added in a pause, to read before it drafts

    def is_paused(self, num_tokens: int) -> bool:
        """Whether it is left alone for a sequence of so many tokens."""
        return self.reason is not None and num_tokens < self.resumes_at


@dataclass(slots=True)
class Record:
    """What a drafter did for all sequences of a lane.

    longest: most tokens that it gave; is_longest: it was asked for more. credit: plain steps that it may lose, earned up to step
    `seen_steps` of the lane. turn: counts calls of `ask`, to choose the sequence of a trial. draft_seconds, row_seconds: per
    draft token of its last drafts, to make a draft and to draw a token for each row; drafts that had to read a prompt first do
    not count. overheads: seconds of its steps besides drafts and forward. search_seconds: of its last searches that found no
    draft.
    """

    belief: Belief = field(default_factory=lambda: Belief(decay=LANE_DECAY))
    steps_left: int = TRIAL_STEPS
    longest: int = 0
    is_longest: bool = False
    credit: float = CREDIT
    seen_steps: int = field(default=0, compare=False)
    turn: int = 0
    draft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    row_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    overheads: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    search_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    @property
    def per_search(self) -> float:
        """Seconds of a search that finds no draft; 0 after a single one, which may have built an index."""
        return median_low(self.search_seconds) if len(self.search_seconds) > 1 else 0.0

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
        self.spend(lost)

    def earn(self, per_step: float, num_steps: int) -> None:
        """Credit the steps of the lane up to step `num_steps`."""
        self.credit = min(CREDIT, self.credit + per_step * (num_steps - self.seen_steps))
        self.seen_steps = num_steps

    def spend(self, lost: float) -> None:
        """Charge plain steps that were lost."""
        self.credit = max(-CREDIT, min(CREDIT, self.credit - lost))
