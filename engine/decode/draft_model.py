"""A small model that drafts: the target's shadow sequences, brought up to date and continued in batches.

Two kinds share this code: a model of its own with its own KV (`Lane.open_drafter`), and the target's first layers, which read the
target's KV and write into draft slots that the target overwrites (`Lane.early_exit`). Tokens are drawn with the target's own
noise, so at any temperature the draft is what the target would draw if it had these logits (Daliri et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from torch import Tensor

from pitlane.engine.decode.sampling import penalise, ranked
from pitlane.engine.run.runner import Runner
from pitlane.engine.types import Draft, Sequence

if TYPE_CHECKING:
    from pitlane.engine.run.lane import Lane

Shadows = dict[int, Sequence]
MAX_SHADOWS = 64  # those of finished requests too, for others that begin alike; the least recently used go first


class DraftModel:
    """Drafts chains and trees. lane: whose pool and batches it uses; shares_kv: whether that is the target's lane."""

    def __init__(self, lane: Lane, runner: Runner, shares_kv: bool) -> None:
        self.lane, self.runner, self.shares_kv = lane, runner, shares_kv
        self.shadows: Shadows = {}  # in order of last use

    def draft(
        self, seqs: SequenceOf[Sequence], limits: SequenceOf[int], branching: SequenceOf[int]
    ) -> list[Draft | None]:
        """Draft up to `limits[i]` tokens behind each sequence.

        branching[d]: children of each node of depth d; all ones is a chain. Its length is the greatest depth.
        """
        counts = {seq.id: min(limit, _size(branching)) for seq, limit in zip(seqs, limits, strict=True)}
        shadows: Shadows = {}
        for seq in seqs:
            shadow = self._shadow(seq, counts[seq.id], shadows)
            if shadow is not None:
                shadows[seq.id] = shadow
        active = [seq for seq in seqs if seq.id in shadows]
        grow = self._chains if max(branching) == 1 else self._trees
        drafts = grow(active, shadows, counts, branching) if active else {}
        return [drafts.get(seq.id) for seq in seqs]

    def _chains(
        self, seqs: SequenceOf[Sequence], shadows: Shadows, counts: dict[int, int], branching: SequenceOf[int]
    ) -> dict[int, Draft]:
        tokens: dict[int, list[int]] = {seq.id: [] for seq in seqs}
        active = list(seqs)
        while active:
            rows = self._logits([shadows[seq.id] for seq in active])
            for seq, logits in zip(active, rows, strict=True):
                token = self._best(seq, logits[-1], tokens[seq.id], 1)[0]
                tokens[seq.id].append(token)
                shadows[seq.id].token_ids.append(token)
            active = [seq for seq in active if len(tokens[seq.id]) < counts[seq.id]]
        return {seq.id: Draft(tokens[seq.id]) for seq in seqs}

    def _trees(
        self, seqs: SequenceOf[Sequence], shadows: Shadows, counts: dict[int, int], branching: SequenceOf[int]
    ) -> dict[int, Draft]:
        """Grow the trees level by level; each level computes all nodes so far, which a small model does in one go."""
        nodes: dict[int, tuple[list[int], list[int]]] = {seq.id: ([], []) for seq in seqs}
        leaves = {seq.id: [-1] for seq in seqs}
        for width in branching:
            active = [seq for seq in seqs if leaves[seq.id] and len(nodes[seq.id][0]) < counts[seq.id]]
            if not active:
                break
            for seq in active:
                shadows[seq.id].draft = Draft(*nodes[seq.id]) if nodes[seq.id][0] else None
            rows = self._logits([shadows[seq.id] for seq in active])
            for seq, logits in zip(active, rows, strict=True):
                tokens, parents = nodes[seq.id]
                grown = []
                for leaf in leaves[seq.id]:
                    for token in self._best(seq, logits[leaf + 1], _path(tokens, parents, leaf), width):
                        if len(tokens) < counts[seq.id]:
                            tokens.append(token)
                            parents.append(leaf)
                            grown.append(len(tokens) - 1)
                leaves[seq.id] = grown
        return {seq.id: Draft(*nodes[seq.id]) for seq in seqs}

    def _best(self, seq: Sequence, logits: Tensor, path: SequenceOf[int], count: int) -> list[int]:
        """The `count` tokens that the target would draw first behind `path`, if these [V] were its logits."""
        if seq.sampling.has_penalties:
            completion = [*seq.token_ids[seq.num_prompt_tokens :], *path]
            logits = penalise(logits, seq.token_ids[: seq.num_prompt_tokens], completion, seq.sampling)
        return ranked(logits, seq.sampling, seq.seed, seq.num_tokens + len(path), count)

    def _shadow(self, seq: Sequence, limit: int, ready: Shadows) -> Sequence | None:
        """Bring the shadow of a sequence to its known tokens, with room for a draft; None where there is none.

        ready: the shadows that are about to draft, which are not forgotten for this one.
        """
        if limit <= 0:
            return None
        if self.shares_kv:
            if not self.lane.pool.reserve(seq, seq.num_tokens + limit):
                return None
            return replace(seq, token_ids=list(seq.token_ids), num_scheduled_tokens=1, draft=None, operations=[])
        shadow = self.shadows.pop(seq.id, None) or self._new_shadow(seq)
        self.shadows[seq.id] = shadow
        computed = min(shadow.num_computed_tokens, seq.num_tokens - 1)
        while shadow.num_cached_tokens < computed and (
            shadow.token_ids[shadow.num_cached_tokens] == seq.token_ids[shadow.num_cached_tokens]
        ):
            shadow.num_cached_tokens += 1
        shadow.num_computed_tokens = shared = min(computed, shadow.num_cached_tokens)
        shadow.token_ids[shared:] = seq.token_ids[shared:]
        shadow.draft = None
        self.lane.pool.roll_back(shadow, shared)
        if not self._make_room(shadow, seq.num_tokens + limit, ready):
            return None
        if shadow.num_uncomputed_tokens > self.lane.pool.block_size:  # alone: the next may share its blocks
            self._logits([shadow])
            shadow.num_cached_tokens = shadow.num_tokens - 1
        return shadow

    def _make_room(self, shadow: Sequence, num_tokens: int, ready: Shadows) -> bool:
        """Reserve blocks, those of the least recently used shadows if need be."""
        while True:
            oldest = next(iter(self.shadows.values()))
            is_needed = oldest is shadow or oldest.id in ready
            if (len(self.shadows) <= MAX_SHADOWS or is_needed) and self.lane.pool.reserve(shadow, num_tokens):
                return True
            if is_needed:
                return False
            self.lane.pool.release(self.shadows.pop(oldest.id))

    def _new_shadow(self, seq: Sequence) -> Sequence:
        """A shadow that shares the blocks of the longest verified prefix of another one with the same salt."""
        shadow = replace(seq, token_ids=[], num_computed_tokens=0, num_cached_tokens=0, block_tables=[], state={})
        akin = [
            (self._num_common_blocks(other, seq), other) for other in self.shadows.values() if other.salt == seq.salt
        ]
        count, best = max(akin, key=lambda pair: pair[0], default=(0, shadow))
        if count:
            self.lane.pool.adopt(shadow, [best.column(index) for index in range(count)])
            shadow.num_computed_tokens = shadow.num_cached_tokens = count * self.lane.pool.block_size
            shadow.token_ids = seq.token_ids[: shadow.num_computed_tokens]
        return shadow

    def _num_common_blocks(self, shadow: Sequence, seq: Sequence) -> int:
        size = self.lane.pool.block_size
        most = min(shadow.num_cached_tokens, seq.num_tokens - 1) // size
        blocks = (slice(index * size, (index + 1) * size) for index in range(most))
        return sum(1 for _ in takewhile(lambda block: shadow.token_ids[block] == seq.token_ids[block], blocks))

    def _logits(self, shadows: SequenceOf[Sequence]) -> list[Tensor]:
        """Compute what the shadows lack: logits [1 + K, V] of the last known token and of the nodes of each one's draft."""
        found: dict[int, Tensor] = {}
        for shadow in shadows:  # of a tree, all nodes are computed again, behind the last known token
            shadow.num_computed_tokens = min(shadow.num_computed_tokens, shadow.num_tokens - 1)
        while len(found) < len(shadows):
            active = [shadow for shadow in shadows if shadow.id not in found]
            for shadow in active:
                shadow.num_scheduled_tokens = min(self.lane.limits.max_step_tokens, shadow.num_uncomputed_tokens)
            logits = self.runner.launch(self.lane.build_batch(active)).wait()
            for shadow in active:
                shadow.num_computed_tokens += shadow.num_scheduled_tokens
                if shadow.num_computed_tokens == shadow.num_tokens:
                    size = 1 + (len(shadow.draft.token_ids) if shadow.draft else 0)
                    found[shadow.id], logits = logits[:size], logits[size:]
        return [found[shadow.id] for shadow in shadows]


def _size(branching: SequenceOf[int]) -> int:
    """Nodes of a full tree."""
    size, level = 0, 1
    for width in branching:
        level *= width
        size += level
    return size


def _path(tokens: SequenceOf[int], parents: SequenceOf[int], node: int) -> list[int]:
    """Tokens from the root to a node."""
    path = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]
