"""Decides how many tokens every sequence of a lane computes in the next step.

There is no prefill phase and no decode phase. Every sequence has uncomputed tokens: one token while it decodes, many tokens after
admission or preemption. Older sequences come first, and decoding sequences never wait for prompts. Prompts share the
rest of the step's limit: half goes to the prompt that is nearest to its end, half to the oldest prompt, so that a short question
does not wait for a long document. A sequence is admitted when every KV group has blocks for all its known tokens. A group with a
limit of visible tokens needs blocks only for the most tokens that a sequence holds there. In such a group, a running prompt drops
blocks and takes new blocks in every step, before another sequence is admitted. When blocks are lacking, the youngest sequence is
preempted and computed again later. If a group evicts blocks by their keys, a prompt ends its share at the next eviction.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from pitlane.engine.errors import PromptTooLong
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import PrefixMatch
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.run.prefixes import Match, Prefixes, is_pending, is_unreadable
from pitlane.engine.sequence import Sequence

log = logging.getLogger("pitlane")
Reclaim = Callable[[SequenceOf[int]], None]


class Scheduler:
    """Waiting and running sequences of one lane. max_step_tokens: most tokens of a step. max_seqs: most running sequences."""

    def __init__(
        self,
        pool: Pool,
        max_step_tokens: int,
        max_seqs: int,
        match: Match,
        reclaim: Reclaim,
        pacing: Pacing,
    ) -> None:
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.max_seqs = max_seqs
        self.prefixes = Prefixes(pool, match)
        self.reclaim = reclaim
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.pacing = pacing

    @property
    def seqs(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    @property
    def is_loading(self) -> bool:
        """Whether every sequence waits for a saved prefix."""
        return not self.running and all(is_pending(seq) for seq in self.waiting)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out and give back its blocks; it may enter again, here or in another lane."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.pool.release(seq.kv)
        seq.num_scheduled_tokens = 0
        seq.kv.prefix = seq.draft = None

    def schedule(self) -> list[Sequence]:
        """Set `num_scheduled_tokens` and reserve blocks for the sequences of the next step, oldest first."""
        for seq in [seq for seq in self.running if seq.forks and seq.is_decoding]:
            self._fork(seq)
        decoding: list[Sequence] = []
        for seq in list(self.running):
            if seq not in self.running:
                continue  # preempted for an older sequence
            if self._reserve(seq, seq.num_tokens + (not seq.is_decoding)) and seq.is_decoding:
                seq.num_scheduled_tokens = 1
                decoding.append(seq)
        room = max(0, self.max_step_tokens - len(decoding))
        is_streamed = any(seq.is_streamed for seq in decoding)
        budget = self.pacing.prompt_tokens(len(decoding), is_streamed, room)
        if budget > 0:
            self._admit_all()
        is_urgent = any(seq.is_streamed for seq in decoding)
        self.prefixes.load(self.running, self.pacing.forward_seconds(len(decoding)) if is_urgent else None)
        prompts = [seq for seq in self.running if seq.kv.prefix is None and seq not in decoding]
        limits = [self.pool.num_before_eviction(seq.kv.num_computed_tokens) for seq in prompts]
        for seq, count in zip(prompts, shares([_num_left(seq) for seq in prompts], budget, limits), strict=True):
            seq.num_scheduled_tokens = count
        return [seq for seq in self.running if seq.num_scheduled_tokens]

    def _admit_all(self) -> None:
        """Admit sequences in order of arrival while there is room."""
        for seq in list(self.waiting):
            num_seqs = sum(1 + len(other.forks) for other in [*self.running, seq])
            if self.running and num_seqs > self.max_seqs:
                break
            if not self._admit(seq) and not is_pending(seq):
                break

    def _fork(self, seq: Sequence) -> None:
        """Start the other samples of a request. All prompt tokens but the last are computed."""
        for child in seq.forks:
            self.pool.fork(seq.kv, child.kv)
            child.is_streamed, child.plan, child.failed = seq.is_streamed, seq.plan, dict(seq.failed)
            child.timing.admitted, child.timing.num_steps = seq.timing.admitted, seq.timing.num_steps
        self.running += seq.forks
        self.running.sort(key=lambda other: other.id)
        seq.forks = []

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; its known tokens are computed again when it is admitted again."""
        self.remove(seq)
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _admit(self, seq: Sequence) -> bool:
        kv = seq.kv
        if kv.prefix is None or is_unreadable(kv.prefix):
            kv.prefix = self.prefixes.find(seq)
        if is_pending(seq) or is_unreadable(kv.prefix):
            return False  # the load may have failed just now: match again in the next step
        if self.prefixes.is_wrong(kv.prefix):
            log.warning("%s gave no saved KV of %d tokens", kv.prefix_plugin, kv.prefix.num_loading_tokens)
            kv.prefix = PrefixMatch()
        # Nothing holds the matched blocks, so the match is valid only in this step.
        prefix, kv.prefix = kv.prefix, None
        if not self._has_room(seq, prefix):
            if prefix.loading is not None:
                kv.prefix = prefix
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        self.running.sort(key=lambda other: other.id)
        self.prefixes.use(seq, prefix)
        reserved = self.pool.reserve(kv, seq.num_tokens + 1)
        assert reserved, "room was checked before admission"
        return True

    def _has_room(self, seq: Sequence, prefix: PrefixMatch) -> bool:
        """Whether blocks for all known tokens, the next token and the other samples are free. Asks plugins for blocks.

        May drop the tail of `prefix`. Sets `seq.error` if blocks are lacking and no sequence runs.
        """
        pool, num_blocks = self.pool, len(prefix.blocks)
        num_cached = prefix.num_loading_tokens if prefix.loading is not None else num_blocks * pool.block_size
        missing = [n + len(seq.forks) for n in pool.num_missing_behind(num_cached, num_blocks, seq.num_tokens + 1)]
        if any(pool.lacking(missing)):
            matched = [*prefix.blocks, *([prefix.tail[0]] if prefix.tail is not None else [])]
            for column in matched:  # keeps the plugin from giving them back
                pool.lock(column)
            self.reclaim(pool.lacking(missing))
            for column in matched:
                pool.unlock(column)
        lacking = pool.lacking(missing)
        if not any(lacking):
            return True
        if prefix.tail is not None:  # without the tail, its block can be given back
            prefix.tail = None
            return self._has_room(seq, prefix)
        if not self.running:
            group = next(index for index, count in enumerate(lacking) if count)
            allocator = pool.allocators[group]
            seq.error = PromptTooLong(
                f"the prompt needs {missing[group]} KV blocks, {allocator.num_free} of {len(allocator.counts)} are free; "
                "close other chats or raise --kv-memory"
            )
        return False

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Reserve blocks. If too few are free, ask plugins, then preempt younger sequences. False: `seq` itself was preempted."""
        while not self.pool.reserve(seq.kv, num_tokens):
            before = self.pool.num_free_blocks
            self.reclaim(self.pool.lacking(self.pool.num_missing(seq.kv, num_tokens)))
            if self.pool.num_free_blocks > before:
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        return True


def shares(left: SequenceOf[int], budget: int, limits: SequenceOf[float] = ()) -> list[int]:
    """Split a budget of tokens among prompts. left: tokens to compute of every prompt, oldest prompt first.

    Half of the budget goes to the prompts that are nearest to their end, the rest to the oldest prompts. limits: the most tokens
    of every prompt; () = no limits.
    """
    counts = [0] * len(left)
    caps = [int(min(pair)) for pair in zip(left, limits or left, strict=True)]
    nearest, by_age = sorted(range(len(left)), key=lambda index: left[index]), range(len(left))
    for order, limit in ((nearest, budget // 2), (by_age, budget)):
        for index in order:
            counts[index] += max(0, min(caps[index] - counts[index], limit - sum(counts)))
    return counts


def _num_left(seq: Sequence) -> int:
    """Tokens to compute now. With several samples, every sample computes the last prompt token itself."""
    return seq.num_uncomputed_tokens - bool(seq.forks)
