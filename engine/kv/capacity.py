"""How many blocks every KV group of a lane gets, and the KV memory that a sequence takes. Sizes are in bytes.

A group is given by its bytes per token and by the most tokens that a position sees (None = no limit). A sequence holds few blocks
in a limited group, however long it is, so the groups without a limit get most of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from pitlane.engine.kv.reach import max_blocks_of
from pitlane.engine.kv.state import BLOCK_SIZE as BLOCK_SIZE
from pitlane.engine.kv.visibility import max_held_tokens

if TYPE_CHECKING:
    from pitlane.engine.kv.store import KVStorePlan
    from pitlane.engine.kv.visibility import Visibility

MAX_STEP_TOKENS = 512
# Assumed length of a sequence, as a fraction of the context. If sequences are longer, blocks of limited groups stay free; if they
# are shorter, blocks of the other groups stay free.
TYPICAL = 0.25


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """kv_bytes: a lane's share of KV memory. context: the limit of a sequence, in tokens."""

    kv_bytes: int
    context: int
    max_step_tokens: int = MAX_STEP_TOKENS
    max_seqs: int = 64


@dataclass(frozen=True, slots=True)
class GroupNeeds:
    """bytes_per_token: of all layers of a group. max_tokens: the most tokens that a position sees; None = no limit.

    fixed_bytes: memory of the store beside its blocks.
    """

    bytes_per_token: int
    max_tokens: int | None
    fixed_bytes: int = 0

    @classmethod
    def of(cls, store: KVStorePlan, visibility: Visibility) -> GroupNeeds:
        return cls(store.bytes_per_token, max_held_tokens(visibility, BLOCK_SIZE), store.fixed_bytes)


def seq_tokens(group: GroupNeeds, num_tokens: int, max_step_tokens: int) -> int:
    """Return how many tokens of a sequence of `num_tokens` tokens a group holds at most."""
    limit = max_blocks_of(group.max_tokens, max_step_tokens, BLOCK_SIZE)
    return num_tokens if limit is None else min(num_tokens, limit * BLOCK_SIZE)


def seq_bytes(groups: Sequence[GroupNeeds], num_tokens: int, max_step_tokens: int) -> int:
    """Return the most KV memory of a sequence of `num_tokens` tokens."""
    return sum(seq_tokens(group, num_tokens, max_step_tokens) * group.bytes_per_token for group in groups)


def num_blocks(groups: Sequence[GroupNeeds], limits: LaneLimits) -> list[int]:
    """Return the number of blocks of every group.

    The limited groups get the blocks of as many sequences of a typical length as the memory holds: at most `max_seqs` sequences, at
    least one; the other groups get the rest. No limited group gets more than in an equal split: a sequence has no more blocks there
    than in any other group. If the memory holds a sequence of the whole context, every group gets at least the blocks of it. If all
    groups are limited, they get all the memory. The fixed bytes of the stores come first: at most a quarter of the memory counts.
    """
    fixed_bytes = sum(group.fixed_bytes for group in groups)
    limits = replace(limits, kv_bytes=limits.kv_bytes - min(fixed_bytes, limits.kv_bytes // 4))
    sizes = [group.bytes_per_token * BLOCK_SIZE for group in groups]
    equal = max(1, limits.kv_bytes // sum(sizes))
    lengths = [seq_tokens(group, limits.context, limits.max_step_tokens) for group in groups]
    whole = [ceil(length / BLOCK_SIZE) for length in lengths]  # blocks of a sequence of the whole context
    needs = [count + 1 for count in whole]
    limited = [index for index, group in enumerate(groups) if group.max_tokens is not None]
    need_bytes = sum(needs[index] * sizes[index] for index in limited)
    if len(limited) == len(groups):
        counts = [max(1, limits.kv_bytes * need // need_bytes) for need in needs]
        is_whole = limits.kv_bytes >= sum(count * size for count, size in zip(whole, sizes, strict=True))
        return whole if is_whole and any(a < b for a, b in zip(counts, whole, strict=True)) else counts
    counts, typical = [0] * len(groups), ceil(limits.context * TYPICAL)
    num_seqs = max(1, min(limits.max_seqs, limits.kv_bytes / seq_bytes(groups, typical, limits.max_step_tokens)))
    room = limits.kv_bytes - sum(whole[index] * size for index, size in enumerate(sizes) if index not in limited)
    is_whole = room >= sum(whole[index] * sizes[index] for index in limited)
    for index in limited:
        counts[index] = min(equal, int(needs[index] * num_seqs))
        if is_whole:
            counts[index] = max(whole[index], min(counts[index], needs[index] * room // need_bytes))
    rest = limits.kv_bytes - sum(count * size for count, size in zip(counts, sizes, strict=True))
    rest_size = sum(size for index, size in enumerate(sizes) if index not in limited)
    return [count or max(1, rest // rest_size) for count in counts]
