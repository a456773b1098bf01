"""Who computes how many tokens in the next step of a lane.

There is no prefill phase and no decode phase: every sequence has uncomputed tokens, one when it decodes, many after admission
or preemption. Older sequences come first, decoding ones never wait for prompts, and prompts share what the budget of a step
leaves: half of it is the oldest one's, half goes to whichever is nearest to its end, so that a short question does not wait
for a long document. While somebody reads a stream the budget is a time (`StepBudget`). A sequence is admitted when there are
blocks for all its known tokens. When the pool runs dry the youngest one is preempted and recomputed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from math import inf

from pitlane.engine.errors import PromptTooLong
from pitlane.engine.kv.pool import Pool
from pitlane.engine.pacing.budget import StepBudget
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.run.batch import Copy, Load
from pitlane.engine.types import PrefixMatch, Sequence

LOAD_RATE = 1.5e9  # bytes a second that saved KV is written into the store with, at least: its pages are new

Match = Callable[[Sequence, Pool], PrefixMatch | None]
Reclaim = Callable[[Pool, int], None]


class Scheduler:
    """Waiting and running sequences of one lane. max_step_tokens: the most tokens of a step; max_seqs: running at once."""

    def __init__(
        self,
        pool: Pool,
        max_step_tokens: int,
        max_seqs: int,
        match: Match,
        reclaim: Reclaim,
        clock: StepClock | None = None,
    ) -> None:
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.max_seqs = max_seqs
        self.match = match
        self.reclaim = reclaim
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.clock = clock or StepClock()
        self.budget = StepBudget()
        self._num_prompt_tokens = 0  # of the step under way

    @property
    def seqs(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    @property
    def is_loading(self) -> bool:
        """Whether all there is to do is to wait for saved prefixes."""
        return not self.running and all(_is_pending(seq) for seq in self.waiting)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and give back its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.pool.release(seq)

    def schedule(self) -> list[Sequence]:
        """Set `num_scheduled_tokens` and reserve blocks for the sequences of the next step, oldest first."""
        for seq in [seq for seq in self.running if seq.forks and seq.is_decoding]:
            self._fork(seq)
        decoding: list[Sequence] = []
        for seq in list(self.running):
            if seq not in self.running or not seq.is_decoding:
                continue  # preempted for an older one, or a prompt, whose blocks are reserved
            if self._reserve(seq, seq.num_computed_tokens + 1):
                seq.num_scheduled_tokens = 1
                decoding.append(seq)
        budget = self._budget(decoding)
        if budget > 0:
            self._admit_all()
        self._load(decoding)
        prompts = [seq for seq in self.running if seq.prefix is None and seq not in decoding]
        for seq, count in zip(prompts, shares([_num_left(seq) for seq in prompts], budget), strict=True):
            seq.num_scheduled_tokens = count
        self._num_prompt_tokens = sum(seq.num_scheduled_tokens for seq in prompts)
        return [seq for seq in self.running if seq.num_scheduled_tokens]

    def took(self, seconds: float) -> None:
        """Take in how long the forward of the step was."""
        self.budget.took(self._num_prompt_tokens, seconds)

    def _budget(self, decoding: list[Sequence]) -> int:
        """Prompt tokens that the step may hold."""
        room = max(0, self.max_step_tokens - len(decoding))
        streamed = any(seq.is_streamed for seq in decoding)
        self.budget.aim(self.clock.estimate(len(decoding)) if streamed else None)
        return min(room, self.budget.num_tokens) if streamed else room

    def _admit_all(self) -> None:
        """Admit in order of arrival whoever there is room for."""
        for seq in list(self.waiting):
            num_seqs = sum(1 + len(other.forks) for other in [*self.running, seq])
            if self.running and num_seqs > self.max_seqs:
                break
            if not self._admit(seq) and not _is_pending(seq):
                break

    def _fork(self, seq: Sequence) -> None:
        """Start the other samples of a request, all of whose prompt but the last token is computed."""
        for child in seq.forks:
            self.pool.fork(seq, child)
            child.num_computed_tokens, child.num_cached_tokens = seq.num_computed_tokens, seq.num_cached_tokens
            child.num_sealed_blocks, child.is_streamed = seq.num_sealed_blocks, seq.is_streamed
            child.plan, child.failed = seq.plan, dict(seq.failed)
            child.timing.admitted, child.timing.num_steps = seq.timing.admitted, seq.timing.num_steps
        self.running += seq.forks
        self.running.sort(key=lambda other: other.id)
        seq.forks = []

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; its known tokens are computed again when it is admitted again."""
        self.running.remove(seq)
        self.pool.release(seq)
        seq.num_scheduled_tokens = 0
        seq.num_computed_tokens = seq.num_sealed_blocks = 0
        seq.prefix = seq.draft = None
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _admit(self, seq: Sequence) -> bool:
        if seq.prefix is None or _is_unreadable(seq.prefix):
            seq.prefix = self._find_prefix(seq)
        if _is_pending(seq):
            return False
        prefix, seq.prefix = seq.prefix, None  # blocks that nobody holds may be another's by the next step
        if not self._has_room(seq, prefix):
            if prefix.loading is not None:
                seq.prefix = prefix
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        self.running.sort(key=lambda other: other.id)
        self._use_prefix(seq, prefix)
        reserved = self.pool.reserve(seq, seq.num_tokens + 1)
        assert reserved, "room was checked before admission"
        return True

    def _find_prefix(self, seq: Sequence) -> PrefixMatch:
        """What plugins know; nothing if it leaves no token to compute or cannot be read."""
        found = self.match(seq, self.pool) or PrefixMatch()
        count = found.num_loading_tokens
        if found.loading is None:
            count = len(found.blocks) * self.pool.block_size + (found.tail[1] if found.tail is not None else 0)
        return PrefixMatch() if count >= seq.num_tokens or _is_unreadable(found) else found

    def _has_room(self, seq: Sequence, prefix: PrefixMatch) -> bool:
        """Whether all known tokens, one more and one for each other sample fit now, beside the matched blocks."""
        missing = self.pool.num_missing_blocks(seq, seq.num_tokens + 1) - len(prefix.blocks) + len(seq.forks)
        if missing > self.pool.num_free_blocks:
            held = [*prefix.blocks, *([prefix.tail[0]] if prefix.tail is not None else [])]
            for column in held:  # or they might be what is given back
                self.pool.lock(column)
            self.reclaim(self.pool, missing - self.pool.num_free_blocks)
            for column in held:
                self.pool.unlock(column)
        if missing <= self.pool.num_free_blocks:
            return True
        if prefix.tail is not None:  # the block that holds it may be the one that lacks
            prefix.tail = None
            return self._has_room(seq, prefix)
        if not self.running:
            seq.error = PromptTooLong(
                f"the prompt needs {missing} KV blocks, {self.pool.num_free_blocks} of {self.pool.num_blocks} are free; "
                "close other chats or raise --kv-memory"
            )
        return False

    def _use_prefix(self, seq: Sequence, prefix: PrefixMatch) -> None:
        pool, size = self.pool, self.pool.block_size
        if prefix.loading is not None:
            seq.prefix = prefix  # until all of it is in the store
            return
        pool.adopt(seq, prefix.blocks)
        seq.num_computed_tokens = len(prefix.blocks) * size
        seq.num_sealed_blocks = len(prefix.blocks)
        if prefix.tail is not None:
            self._copy_tail(seq, *prefix.tail)
        self._used_prefix(seq)

    def _load(self, decoding: list[Sequence]) -> None:
        """Write saved prefixes into the store; beside streams that are read, only what takes about as long as their own step."""
        plain = self.clock.estimate(len(decoding)) if any(seq.is_streamed for seq in decoding) else None
        room = inf if plain is None else plain * LOAD_RATE
        for seq in self.running:
            if seq.prefix is None or room <= 0:
                continue
            assert seq.prefix.loading is not None, "others are used at once"
            tensors, count = seq.prefix.loading.result(), seq.prefix.num_loading_tokens
            assert tensors is not None, "unreadable prefixes are not admitted"
            per_token = sum(tensor.nbytes for tensor in tensors.values()) / count
            start = seq.num_computed_tokens
            stop = min(count, start + 1 + int(min(count, room / max(1.0, per_token))))
            slots = [self.pool.slots(seq, group, start, stop) for group in range(len(self.pool.groups))]
            self.pool.operations.append(Load(slots, tensors, start))
            room -= (stop - start) * per_token
            seq.num_computed_tokens = stop
            if stop == count:
                seq.prefix = None
                self._used_prefix(seq)

    @staticmethod
    def _used_prefix(seq: Sequence) -> None:
        assert seq.num_computed_tokens < seq.num_tokens, "a prefix leaves a token to compute"
        seq.num_cached_tokens = max(seq.num_cached_tokens, min(seq.num_computed_tokens, seq.num_prompt_tokens))

    def _copy_tail(self, seq: Sequence, column: tuple[int, ...], count: int) -> None:
        pool, start = self.pool, seq.num_computed_tokens
        if not pool.reserve(seq, start + count):
            return
        for group, block in enumerate(column):
            sources = list(range(block * pool.block_size, block * pool.block_size + count))
            self.pool.operations.append(Copy(group, sources, pool.slots(seq, group, start, start + count)))
        seq.num_computed_tokens += count

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens`: free ones, then plugins' idle ones, then those of younger sequences, then none."""
        while not self.pool.reserve(seq, num_tokens):
            missing = self.pool.num_missing_blocks(seq, num_tokens) - self.pool.num_free_blocks
            before = self.pool.num_free_blocks
            self.reclaim(self.pool, missing)
            if self.pool.num_free_blocks > before:
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        return True


def shares(left: SequenceOf[int], budget: int) -> list[int]:
    """Split a budget among prompts that have `left` tokens each, the oldest first.

    Half goes to those nearest to their end, the rest by age.
    """
    found = [0] * len(left)
    nearest, by_age = sorted(range(len(left)), key=lambda index: left[index]), range(len(left))
    for order, most in ((nearest, budget // 2), (by_age, budget)):
        for index in order:
            found[index] += max(0, min(left[index] - found[index], most - sum(found)))
    return found


def _num_left(seq: Sequence) -> int:
    """Tokens to compute before it decodes; the last one is left to each of several samples."""
    return seq.num_uncomputed_tokens - bool(seq.forks)


def _is_pending(seq: Sequence) -> bool:
    return seq.prefix is not None and seq.prefix.loading is not None and not seq.prefix.loading.done()


def _is_unreadable(prefix: PrefixMatch) -> bool:
    loading = prefix.loading
    if loading is None or not loading.done():
        return False
    return loading.cancelled() or loading.exception() is not None or loading.result() is None
