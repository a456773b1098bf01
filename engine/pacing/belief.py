"""The knowledge of pacing about drafters, as numbers; the governor decides.

`Belief` is the expectation of accepted tokens. `Outlook` is the state of one sequence and its drafter, `Record` the state of one
drafter in a lane. Comments at constants say what tests/engine/pacing/ablation.py measures when a constant changes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat
from math import log
from operator import mul
from statistics import median_low

from pitlane.engine.decode.draft import Draft

MAX_DRAFT = 64  # tokens of a chain; bounds the work of a step; 32: 78 % slower where nearly all draft tokens are right
MIN_CHANCE = 0.01  # of acceptance of a draft token; off: no slower, but `ask` takes 1.4 times as long for 16 sequences
LANE_WEIGHT = 10.0  # tested tokens of the lane in the belief of a sequence in a batch; off: batches up to 10 % slower
# Belief about a new drafter, as if from so many drafts. Other rates: within 0.7 %; half or double the drafts: 1.2 % slower.
PRIOR_RATE, PRIOR_STEPS = 0.75, 2.0
# Weight of earlier drafts after each draft. 0.8 for sequences: good drafters are 1 % slower; 0.9 for lanes: 0.3 % slower.
DECAY, LANE_DECAY = 0.9, 0.98
CREDIT = 3.0  # plain steps that a drafter may lose in a lane at once; off: drafters that do not help cost 8 % more


@dataclass(slots=True)
class Belief:
    """Expected acceptance of a drafter, from decayed sums over its verified drafts.

    accepted, tried: tested draft tokens; a draft tests its tokens up to the first miss. gained, offered, num_drafts: accepted
    tokens and all tokens of the drafts, for trees, whose tokens are no chain.
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
        """Chance that a token of a chain is accepted if the token before it was."""
        return min(0.999, self.accepted / self.tried)

    def update(self, draft: Draft, num_accepted: int) -> None:
        """Learn from one verified draft."""
        size = len(draft.token_ids)
        self.accepted = self.decay * self.accepted + num_accepted
        self.tried = self.decay * self.tried + min(num_accepted + 1, size)
        self.gained = self.decay * self.gained + num_accepted
        self.offered = self.decay * self.offered + size
        self.num_drafts = self.decay * self.num_drafts + 1
        self.is_tree = self.is_tree or draft.parents is not None

    def gains(self, limit: int) -> tuple[list[float], list[float]]:
        """Expected accepted tokens of each part of a draft of at most `limit` tokens, and the tokens of each part.

        A chain has a part per token, without the tokens that are hardly ever accepted. A tree is one part, of the mean size.
        """
        if self.is_tree:
            size = min(limit, self.offered / self.num_drafts)
            return [self.gained * size / self.offered], [size]
        length = min(limit, MAX_DRAFT, 1 + int(log(MIN_CHANCE, self.rate)) if self.rate > MIN_CHANCE else 1)
        return list(accumulate(repeat(self.rate, length), mul)), [1.0] * length

    def expected(self, size: int) -> float:
        """Expected accepted tokens of a draft of `size` tokens."""
        if not size:
            return 0.0
        if self.is_tree:
            return self.gains(size)[0][0]
        return self.rate * (1 - self.rate**size) / (1 - self.rate)

    def blended(self, lane: Belief) -> Belief:
        """This belief with a part of the belief of the lane: a few drafts, or unlucky drafts, say little."""
        belief = replace(self, accepted=self.accepted + LANE_WEIGHT * lane.rate, tried=self.tried + LANE_WEIGHT)
        if lane.num_drafts and self.num_drafts:
            share = PRIOR_STEPS / lane.num_drafts
            belief.gained += share * lane.gained
            belief.offered += share * lane.offered
            belief.num_drafts += PRIOR_STEPS
        return belief

    def inherited(self) -> Belief:
        """The same expectation with the weight of a prior: for a new sequence, or after a pause."""
        share = min(1.0, PRIOR_STEPS / self.num_drafts) if self.num_drafts else 0.0
        drafts = {name: share * getattr(self, name) for name in ("gained", "offered", "num_drafts")}
        return Belief(accepted=self.rate * PRIOR_STEPS, tried=PRIOR_STEPS, is_tree=self.is_tree, **drafts)


@dataclass(slots=True)
class Outlook:
    """What pacing expects of the drafter on one sequence.

    has_trial: the next draft that does not seem to pay is tried, not paused. reason: why the drafter is paused, up to token
    `resumes_at`. asked: draft tokens of the last decision, repeated up to token `repeats_until`. has_unread: a draft model must
    read the sequence before its first draft.
    """

    belief: Belief = field(default_factory=Belief)
    has_trial: bool = True
    resumes_at: int = 0
    reason: str | None = None
    asked: int = 0
    repeats_until: int = 0
    has_unread: bool = True

    def is_paused(self, num_tokens: int) -> bool:
        """Whether the drafter is paused for a sequence of `num_tokens`."""
        return self.reason is not None and num_tokens < self.resumes_at

    def pause(self, reason: str, resumes_at: int) -> None:
        self.reason, self.resumes_at = reason, resumes_at


@dataclass(slots=True)
class Record:
    """What a drafter did for all sequences of a lane.

    longest: tokens of its longest draft. gives_less: it gave fewer tokens than were asked for. credit: plain steps that it may
    lose, earned up to step `earned_steps` of the lane. num_asks: calls of `Governor.ask`. draft_seconds, row_seconds: seconds per
    draft token of its last drafts, to make the draft and to draw a token for each row. A draft for which a prompt was read first
    does not count. overheads: seconds of its steps besides drafts and forward. search_seconds: of its last searches without a
    draft.
    """

    belief: Belief = field(default_factory=lambda: Belief(decay=LANE_DECAY))
    longest: int = 0
    gives_less: bool = False
    credit: float = CREDIT
    earned_steps: int = field(default=0, compare=False)
    num_asks: int = 0
    draft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    row_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    overheads: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    search_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    @property
    def per_search(self) -> float:
        """Seconds of a search that finds no draft. 0 after a single search, which may have built an index."""
        return median_low(self.search_seconds) if len(self.search_seconds) > 1 else 0.0

    @property
    def per_token(self) -> float:
        """Seconds of a draft token, with the draw for its row."""
        return sum(median_low(seconds) for seconds in (self.draft_seconds, self.row_seconds) if seconds)

    @property
    def max_draft(self) -> int:
        """Tokens that the drafter may give: 1 more than its longest draft, lest a text with short drafts bounds all later drafts.

        Without this bound: 14 % slower where drafts are short and steps with drafts are dear.
        """
        return self.longest + 1 if self.gives_less else 2 * self.longest

    def update(self, draft: Draft, num_accepted: int, num_asked: int, num_lost: float) -> None:
        """Learn from one verified draft. num_lost: plain steps that the draft lost, negative if it gained."""
        size = len(draft.token_ids)
        self.gives_less = size < num_asked or (self.gives_less and size <= self.longest)
        self.longest = max(self.longest, size)
        self.belief.update(draft, num_accepted)
        self.spend(num_lost)

    def earn(self, per_step: float, num_steps: int) -> None:
        """Add credit for the steps of the lane up to step `num_steps`."""
        self.credit = min(CREDIT, self.credit + per_step * (num_steps - self.earned_steps))
        self.earned_steps = num_steps

    def spend(self, num_lost: float) -> None:
        """Charge plain steps that drafts lost; one slow moment makes no debt beyond `CREDIT`."""
        self.credit = min(CREDIT, max(self.credit - num_lost, min(self.credit, -CREDIT)))
