"""How much work a step of one lane does: `before` a step it says how many tokens to draft, `after` the step it learns.

Parts: the clock (times of forwards), the governor (draft tokens), the budget (prompt tokens beside streams). The loop, the
scheduler and the stats know `Pacing` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from pitlane.engine.events import StepStats
from pitlane.engine.pacing.budget import StepBudget
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.pacing.drafting import Drafting
from pitlane.engine.pacing.governor import Governor
from pitlane.engine.sequence import Sequence


class Pacing:
    """The pacing of one lane. max_step_tokens: the limit of a step, drafts included."""

    def __init__(self, max_step_tokens: int) -> None:
        self.clock = StepClock()
        self.governor = Governor(self.clock, max_step_tokens)
        self.budget = StepBudget()

    def before(self, seqs: SequenceOf[Sequence], draft_limit: Callable[[Sequence], int]) -> Iterator[Drafting]:
        """Ask for drafts in a step over `seqs`: for every drafter that is not paused, how many tokens for which sequence.

        Yields one drafter at a time. The caller fills in its drafts and seconds before it takes the next drafter, which is asked
        for fewer tokens if the step has become long. draft_limit: the most draft tokens of a sequence by answer length, memory
        and context.
        """
        decoding = [seq for seq in seqs if seq.is_decoding]
        self.governor.start_step(sum(seq.num_scheduled_tokens for seq in seqs), len(decoding))
        by_plan: dict[int, list[Sequence]] = {}
        for seq in decoding:
            if seq.plan.drafter is not None:
                by_plan.setdefault(id(seq.plan), []).append(seq)
        for plan_seqs in by_plan.values():
            drafter = plan_seqs[0].plan.drafter
            if drafter is not None and not self.governor.is_paused(plan_seqs):
                drafting = self.governor.ask(drafter, plan_seqs, [draft_limit(seq) for seq in plan_seqs])
                if any(drafting.asked):
                    yield drafting
                    self.governor.add(drafting)

    def after(self, stats: StepStats, draftings: SequenceOf[Drafting]) -> None:
        """Learn from a step: its times, and the acceptance of its drafts."""
        drafting_seconds = sum(drafting.seconds + drafting.row_seconds for drafting in draftings)
        overhead = stats.seconds - stats.forward_seconds - drafting_seconds
        has_prompt = stats.num_prompt_tokens > 0
        self.governor.learn(draftings, None if has_prompt or not stats.num_draft_tokens else overhead)
        if not has_prompt and not stats.num_draft_tokens:
            self.clock.record_overhead(overhead)
        self.clock.record(stats.num_tokens, stats.num_prompt_tokens, stats.forward_seconds)
        self.budget.took(stats.num_prompt_tokens, stats.forward_seconds)

    def prompt_tokens(self, num_decoding: int, is_streamed: bool, room: int) -> int:
        """How many prompt tokens the next step may hold, at most `room`. is_streamed: a reader waits for a decoding sequence."""
        self.budget.aim(self.clock.estimate(num_decoding) if is_streamed else None)
        return min(room, self.budget.num_tokens) if is_streamed else room

    def forward_seconds(self, num_tokens: int) -> float | None:
        """Estimated time of a forward over `num_tokens`; None before the first forward."""
        return self.clock.estimate(num_tokens)

    @property
    def seconds_per_prompt_token(self) -> float | None:
        """Median of the last steps with a prompt; None before the first prompt."""
        return self.clock.per_prompt_token
