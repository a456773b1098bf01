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
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from math import inf
from typing import TYPE_CHECKING

from pitlane.engine.errors import PromptTooLong
from pitlane.engine.kv.operations import Copy, Load
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState, PrefixMatch
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("pitlane")
LOAD_RATE = 1.5e9  # bytes per second: a low estimate for writing saved KV into new pages of the store

Match = Callable[[Sequence], PrefixMatch | None]
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
        self.match = match
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
        return not self.running and all(_is_pending(seq) for seq in self.waiting)

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
        self._load(decoding)
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
            if not self._admit(seq) and not _is_pending(seq):
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
        if kv.prefix is None or _is_unreadable(kv.prefix):
            kv.prefix = self._find_prefix(seq)
        if _is_pending(seq) or _is_unreadable(
            kv.prefix
        ):  # the loading may have failed just now: ask again in the next step
            return False
        if self._is_wrong(kv.prefix):
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
        self._use_prefix(seq, prefix)
        reserved = self.pool.reserve(kv, seq.num_tokens + 1)
        assert reserved, "room was checked before admission"
        return True

    def _find_prefix(self, seq: Sequence) -> PrefixMatch:
        """Return the match of a plugin, or an empty match if it leaves no token to compute or cannot be read."""
        match = self.match(seq) or PrefixMatch()
        if match.num_loading_tokens == 0 and _is_unreadable(
            match
        ):  # a look-up that has ended already: ask for its outcome
            match = self.match(seq) or PrefixMatch()
        if self.pool.whole_blocks:
            match.tail = None
        count = match.num_loading_tokens
        if match.loading is None:
            count = len(match.blocks) * self.pool.block_size + (match.tail[1] if match.tail is not None else 0)
        return PrefixMatch() if count >= seq.num_tokens or _is_unreadable(match) else match

    def _is_wrong(self, prefix: PrefixMatch) -> bool:
        """Whether the loaded tensors of a prefix lack a group, or tokens, or have another shape."""
        if prefix.loading is None:
            return False
        tensors, count = prefix.loading.result(), prefix.num_loading_tokens
        for index, group in enumerate(self.pool.groups):
            tensor = tensors.get(f"group.{index}") if isinstance(tensors, Mapping) else None
            *shape, num_tokens, dim = getattr(tensor, "shape", (0, 0))
            expected = [2, len(group.layers), group.num_kv_heads, self.pool.saved_dims[index]]
            sinks, window = self.pool.kept(index, count)
            num_kept = len(sinks) + len(window)
            if [*shape, dim] != expected or num_tokens < num_kept or (sinks and num_tokens != num_kept):
                return True
        return False

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

    def _use_prefix(self, seq: Sequence, prefix: PrefixMatch) -> None:
        pool = self.pool
        if prefix.loading is not None:
            seq.kv.prefix = prefix  # `_load` clears it when the whole prefix is in the store
            pool.adopt_loaded(seq.kv, prefix.num_loading_tokens)
            return
        pool.adopt(seq.kv, prefix.blocks)
        if prefix.tail is not None:
            self._copy_tail(seq, *prefix.tail)
        self._used_prefix(seq)

    def _load(self, decoding: list[Sequence]) -> None:
        """Write saved prefixes into the store. If a decoding sequence is streamed, take about the time of a decode step."""
        plain = self.pacing.forward_seconds(len(decoding)) if any(seq.is_streamed for seq in decoding) else None
        room = inf if plain is None else plain * LOAD_RATE
        for seq in self.running:
            kv = seq.kv
            if kv.prefix is None or room <= 0:
                continue
            assert kv.prefix.loading is not None, "blocks are adopted at once"
            tensors, count = kv.prefix.loading.result(), kv.prefix.num_loading_tokens
            assert tensors is not None, "unreadable prefixes are not admitted"
            per_token = sum(tensor.nbytes for tensor in tensors.values()) / count  # a low estimate
            start, end = kv.num_computed_tokens, self.pool.num_reusable(count)
            stop = min(end, start + 1 + int(min(count, room / max(1.0, per_token))))
            self.pool.queue.append(self._load_operation(kv, tensors, start, stop, count))
            room -= (stop - start) * per_token
            kv.num_computed_tokens = stop
            if stop == end:
                kv.prefix = None
                self._used_prefix(seq)

    def _load_operation(self, kv: KVState, tensors: Mapping[str, Tensor], start: int, stop: int, count: int) -> Load:
        """Load the tokens `[start, stop)` of `count` saved tokens. A tensor lacks tokens that no later token sees.

        A tensor ends with the last of the saved tokens. So the place of a token in it follows from the number of tokens behind.
        """
        slots, starts = [], []
        for group in range(len(self.pool.groups)):
            wanted: list[int] = []
            num_left = 0
            for kept in self.pool.kept(group, count):
                first, end = max(start, kept.start), min(stop, kept.stop)
                wanted += self.pool.slots(kv, group, first, end) if first < end else []
                num_left += max(0, kept.stop - first)
            slots.append(wanted)
            starts.append(tensors[f"group.{group}"].shape[3] - num_left)
        return Load(slots, tensors, starts)

    @staticmethod
    def _used_prefix(seq: Sequence) -> None:
        kv = seq.kv
        assert kv.num_computed_tokens < seq.num_tokens, "a prefix leaves a token to compute"
        kv.num_cached_tokens = max(kv.num_cached_tokens, min(kv.num_computed_tokens, seq.request.num_prompt_tokens))

    def _copy_tail(self, seq: Sequence, column: tuple[int, ...], count: int) -> None:
        pool, start = self.pool, seq.kv.num_computed_tokens
        if not pool.reserve(seq.kv, start + count):
            return
        for group, block in enumerate(column):
            sources = list(range(block * pool.block_size, block * pool.block_size + count))
            self.pool.queue.append(Copy(group, sources, pool.slots(seq.kv, group, start, start + count)))
        seq.kv.num_computed_tokens += count

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


def _is_pending(seq: Sequence) -> bool:
    prefix = seq.kv.prefix
    return prefix is not None and prefix.loading is not None and not prefix.loading.done()


def _is_unreadable(prefix: PrefixMatch) -> bool:
    loading = prefix.loading
    if loading is None or not loading.done():
        return False
    if loading.cancelled() or loading.exception() is not None:
        return True
    return loading.result() is None or prefix.num_loading_tokens < 1
