"""Who computes how many tokens in the next step of a lane.

There is no prefill phase and no decode phase: every sequence has uncomputed tokens, one when it decodes, many after admission
or preemption. Older sequences come first, decoding ones never wait for prompts, and prompts share what the token budget
leaves. When the pool runs dry the youngest sequence is preempted and recomputed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pitlane.engine.batch import Copy, Load, Operation
from pitlane.engine.errors import PromptTooLong
from pitlane.engine.pool import Pool
from pitlane.engine.types import PrefixMatch, Sequence

Match = Callable[[Sequence, Pool], PrefixMatch | None]
Reclaim = Callable[[Pool, int], None]


class Scheduler:
    """Waiting and running sequences of one lane. max_step_tokens: the token budget of a step; max_seqs: running at once."""

    def __init__(self, pool: Pool, max_step_tokens: int, max_seqs: int, match: Match, reclaim: Reclaim) -> None:
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.max_seqs = max_seqs
        self.match = match
        self.reclaim = reclaim
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.operations: list[Operation] = []  # to be carried out before the next forward

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
        """Set `num_scheduled_tokens` and reserve blocks for the sequences of the next step."""
        scheduled: list[Sequence] = []
        budget = self.max_step_tokens - sum(seq.is_decoding for seq in self.running)
        for seq in list(self.running):
            if seq not in self.running:
                continue  # preempted for an older one
            count = 1 if seq.is_decoding else min(seq.num_uncomputed_tokens, max(0, budget))
            if count and self._reserve(seq, seq.num_computed_tokens + count):
                budget -= 0 if seq.is_decoding else count
                seq.num_scheduled_tokens = count
                scheduled.append(seq)
        for seq in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_seqs or not self._admit(seq):
                if _is_pending(seq):
                    continue
                break
            count = min(seq.num_uncomputed_tokens, budget)
            if not self._reserve(seq, seq.num_computed_tokens + count):
                break
            budget -= count
            seq.num_scheduled_tokens = count
            scheduled.append(seq)
        return scheduled

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; its known tokens are computed again when it is admitted again."""
        self.running.remove(seq)
        self.pool.release(seq)
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
        return True

    def _find_prefix(self, seq: Sequence) -> PrefixMatch:
        """What plugins know; nothing if it leaves no token to compute or cannot be read."""
        found = self.match(seq, self.pool) or PrefixMatch()
        count = found.num_loading_tokens
        if found.loading is None:
            count = len(found.blocks) * self.pool.block_size + (found.tail[1] if found.tail is not None else 0)
        return PrefixMatch() if count >= seq.num_tokens or _is_unreadable(found) else found

    def _has_room(self, seq: Sequence, prefix: PrefixMatch) -> bool:
        """Whether all known tokens and one more fit now, beside the matched blocks."""
        missing = self.pool.num_missing_blocks(seq, seq.num_tokens + 1) - len(prefix.blocks)
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
            tensors = prefix.loading.result()
            count = prefix.num_loading_tokens
            assert tensors is not None, "unreadable prefixes are not admitted"
            reserved = pool.reserve(seq, count)
            assert reserved, "room was checked before admission"
            slots = [pool.slots(seq, group, 0, count) for group in range(len(pool.groups))]
            self.operations.append(Load(slots, tensors))
            seq.num_computed_tokens = count
        else:
            pool.adopt(seq, prefix.blocks)
            seq.num_computed_tokens = len(prefix.blocks) * size
            seq.num_sealed_blocks = len(prefix.blocks)
            if prefix.tail is not None:
                self._copy_tail(seq, *prefix.tail)
        assert seq.num_computed_tokens < seq.num_tokens, "a prefix leaves a token to compute"
        seq.num_cached_tokens = max(seq.num_cached_tokens, min(seq.num_computed_tokens, seq.num_prompt_tokens))

    def _copy_tail(self, seq: Sequence, column: tuple[int, ...], count: int) -> None:
        pool, start = self.pool, seq.num_computed_tokens
        if not pool.reserve(seq, start + count):
            return
        for group, block in enumerate(column):
            sources = list(range(block * pool.block_size, block * pool.block_size + count))
            self.operations.append(Copy(group, sources, pool.slots(seq, group, start, start + count)))
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


def _is_pending(seq: Sequence) -> bool:
    return seq.prefix is not None and seq.prefix.loading is not None and not seq.prefix.loading.done()


def _is_unreadable(prefix: PrefixMatch) -> bool:
    loading = prefix.loading
    if loading is None or not loading.done():
        return False
    return loading.cancelled() or loading.exception() is not None or loading.result() is None
