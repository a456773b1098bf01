"""A draft model: it keeps a shadow of every sequence, updates the shadows, and extends them in batches.

There are two kinds. A separate model has its own KV (`Lane.open_drafter`). The first layers of the target read the target's KV
and write into draft slots; the target overwrites these slots later (`Lane.early_exit`). Both draw with the noise of the target.
So at any temperature, the draft holds the tokens that the target would draw from these logits (Daliri et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import takewhile

from torch import Tensor

from pitlane.engine.decode.draft import Draft
from pitlane.engine.decode.sampling import penalise, ranked
from pitlane.engine.kv.state import KVState
from pitlane.engine.run.batch import BatchBuilder, Chunk
from pitlane.engine.run.runner import Runner
from pitlane.engine.sequence import Sequence

# With the shadows of ended requests: a later request may share their prefix. The least recently used shadow goes first.
MAX_SHADOWS = 64


@dataclass(slots=True, eq=False)
class Shadow:
    """A sequence as the draft model sees it. num_verified_tokens: leading tokens that the sequence holds too, KV included."""

    salt: str = ""
    token_ids: list[int] = field(default_factory=list)
    kv: KVState = field(default_factory=KVState)
    num_verified_tokens: int = 0
    draft: Draft | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


Shadows = dict[int, Shadow]  # by sequence id


class DraftModel:
    """Drafts chains and trees. shares_kv: the draft model is the first layers of the target and uses its KV."""

    def __init__(self, builder: BatchBuilder, runner: Runner, max_step_tokens: int, shares_kv: bool) -> None:
        self.builder, self.runner, self.shares_kv = builder, runner, shares_kv
        self.pool, self.max_step_tokens = builder.pool, max_step_tokens
        self.shadows: Shadows = {}  # in order of last use

    def draft(
        self, seqs: SequenceOf[Sequence], limits: SequenceOf[int], branching: SequenceOf[int]
    ) -> list[Draft | None]:
        """Draft up to `limits[i]` tokens behind each sequence.

        branching[d]: number of children of a node of depth d. A chain has 1 everywhere. len(branching): depth of the draft.
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
        """Grow the trees level by level. A level computes all earlier nodes again: one forward, and cheap in a small model."""
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
                children = []
                for leaf in leaves[seq.id]:
                    for token in self._best(seq, logits[leaf + 1], _path(tokens, parents, leaf), width):
                        if len(tokens) < counts[seq.id]:
                            tokens.append(token)
                            parents.append(leaf)
                            children.append(len(tokens) - 1)
                leaves[seq.id] = children
        return {seq.id: Draft(*nodes[seq.id]) for seq in seqs}

    def _best(self, seq: Sequence, logits: Tensor, path: SequenceOf[int], count: int) -> list[int]:
        """The `count` tokens that the target would draw first after `path`, if its logits were these logits [V]."""
        request = seq.request
        if request.sampling.has_penalties:
            completion = [*seq.token_ids[request.num_prompt_tokens :], *path]
            logits = penalise(logits, seq.token_ids[: request.num_prompt_tokens], completion, request.sampling)
        return ranked(logits, request.sampling, request.seed, seq.num_tokens + len(path), count)

    def _shadow(self, seq: Sequence, limit: int, ready: Shadows) -> Shadow | None:
        """Update the shadow of a sequence to the known tokens, and reserve room for the draft. None without room.

        ready: shadows that are about to draft; they keep their blocks.
        """
        if limit <= 0:
            return None
        if self.shares_kv:
            if not self.pool.reserve(seq.kv, seq.num_tokens + limit):
                return None
            return Shadow(token_ids=list(seq.token_ids), kv=replace(seq.kv))
        shadow = self.shadows.pop(seq.id, None) or self._new_shadow(seq)
        self.shadows[seq.id] = shadow
        num_computed = min(shadow.kv.num_computed_tokens, seq.num_tokens - 1)
        while shadow.num_verified_tokens < num_computed and (
            shadow.token_ids[shadow.num_verified_tokens] == seq.token_ids[shadow.num_verified_tokens]
        ):
            shadow.num_verified_tokens += 1
        num_shared = min(num_computed, shadow.num_verified_tokens)
        shadow.token_ids[num_shared:] = seq.token_ids[num_shared:]
        shadow.draft = None
        shadow.kv.num_computed_tokens = num_shared
        self.pool.roll_back(shadow.kv, num_shared)
        if not self._make_room(shadow, seq.num_tokens + limit, ready):
            return None
        if shadow.num_tokens - num_shared > self.pool.block_size:
            self._logits([shadow])  # compute it now: the next shadow may share its blocks
            shadow.num_verified_tokens = shadow.num_tokens - 1
        return shadow

    def _make_room(self, shadow: Shadow, num_tokens: int, ready: Shadows) -> bool:
        """Reserve blocks. If too few are free, release the least recently used shadows."""
        while True:
            oldest_id, oldest = next(iter(self.shadows.items()))
            is_needed = oldest is shadow or oldest_id in ready
            if (len(self.shadows) <= MAX_SHADOWS or is_needed) and self.pool.reserve(shadow.kv, num_tokens):
                return True
            if is_needed:
                return False
            self.pool.release(self.shadows.pop(oldest_id).kv)

    def _new_shadow(self, seq: Sequence) -> Shadow:
        """A shadow that shares the blocks of the longest verified prefix among the shadows with the same salt."""
        shadow = Shadow(salt=seq.request.salt)
        same_salt = [other for other in self.shadows.values() if other.salt == shadow.salt]
        counts = [(self._num_common_blocks(other, seq), other) for other in same_salt]
        count, nearest = max(counts, key=lambda pair: pair[0], default=(0, shadow))
        if count:
            self.pool.adopt(shadow.kv, [nearest.kv.column(index) for index in range(count)])
            shadow.num_verified_tokens = shadow.kv.num_computed_tokens
            shadow.token_ids = seq.token_ids[: shadow.num_verified_tokens]
        return shadow

    def _num_common_blocks(self, shadow: Shadow, seq: Sequence) -> int:
        size = self.pool.block_size
        num_blocks = min(shadow.num_verified_tokens, seq.num_tokens - 1) // size
        blocks = (slice(index * size, (index + 1) * size) for index in range(num_blocks))
        return sum(1 for _ in takewhile(lambda block: shadow.token_ids[block] == seq.token_ids[block], blocks))

    def _logits(self, shadows: SequenceOf[Shadow]) -> list[Tensor]:
        """Compute the missing KV; per shadow, return the logits [1 + K, V] after the last token and after the draft's nodes."""
        logits_of: dict[int, Tensor] = {}
        for shadow in shadows:  # recompute the last token, and all nodes of a tree
            shadow.kv.num_computed_tokens = min(shadow.kv.num_computed_tokens, shadow.num_tokens - 1)
        while len(logits_of) < len(shadows):
            active = [shadow for shadow in shadows if id(shadow) not in logits_of]
            chunks = [self._chunk(shadow) for shadow in active]
            logits = self.runner.run(self.builder.build(chunks)).logits
            for shadow, chunk in zip(active, chunks, strict=True):
                shadow.kv.num_computed_tokens += len(chunk.token_ids)
                if chunk.wants_logits:
                    size = 1 + (len(shadow.draft.token_ids) if shadow.draft else 0)
                    logits_of[id(shadow)], logits = logits[:size], logits[size:]
        return [logits_of[id(shadow)] for shadow in shadows]

    def _chunk(self, shadow: Shadow) -> Chunk:
        start = shadow.kv.num_computed_tokens
        stop = min(start + self.max_step_tokens, shadow.num_tokens)
        is_last = stop == shadow.num_tokens
        return Chunk(shadow.kv, shadow.token_ids[start:stop], shadow.draft if is_last else None, is_last)


def _size(branching: SequenceOf[int]) -> int:
    """Number of nodes of a full tree, without the root."""
    size, level = 0, 1
    for width in branching:
        level *= width
        size += level
    return size


def _path(tokens: SequenceOf[int], parents: SequenceOf[int], node: int) -> list[int]:
    """Draft tokens from the root's child to the node, both included."""
    path = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]
