"""How many blocks every KV group of a lane gets, and the KV memory that a sequence takes. Sizes are in bytes.

A group is given by its bytes per token and by the most tokens that a position sees (None = no limit). A sequence holds few blocks
in a limited group, however long it is, so the groups without a limit get most of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from pitlane.engine.kv.pool import most_blocks

TYPICAL = (
    1 / 4
)  # length of a sequence as a part of the context: longer sequences leave limited blocks free, shorter ones others


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """kv_bytes: a lane's share of KV memory. context: the limit of a sequence, in tokens."""

    kv_bytes: int
    context: int
    max_step_tokens: int = 512
    max_seqs: int = 64


@dataclass(frozen=True, slots=True)
class GroupNeeds:
    """bytes_per_token: of all layers of a group. max_tokens: the most tokens that a position sees; None = no limit."""

    bytes_per_token: int
    max_tokens: int | None


def seq_blocks(group: GroupNeeds, num_tokens: int, max_step_tokens: int, block_size: int) -> int:
    """Return the most blocks that a sequence of `num_tokens` tokens holds in a group."""
    count, limit = ceil(num_tokens / block_size), most_blocks(group.max_tokens, max_step_tokens, block_size)
    return count if limit is None else min(count, limit)


def seq_bytes(groups: Sequence[GroupNeeds], num_tokens: int, max_step_tokens: int, block_size: int) -> int:
    """Return the KV memory of a sequence of `num_tokens` tokens."""
    counts = [seq_blocks(group, num_tokens, max_step_tokens, block_size) for group in groups]
    return sum(count * group.bytes_per_token * block_size for count, group in zip(counts, groups, strict=True))


def num_blocks(groups: Sequence[GroupNeeds], limits: LaneLimits, block_size: int) -> list[int]:
    """Return the number of blocks of every group.

    The limited groups get the blocks of as many sequences of a typical length as the memory holds: at most `max_seqs` sequences, at
    least one; the other groups get the rest. No limited group gets more than in an equal split: a sequence has no more blocks there
    than in any other group. If all groups are limited, they get all the memory.
    """
    sizes = [group.bytes_per_token * block_size for group in groups]
    equal = max(1, limits.kv_bytes // sum(sizes))
    needs = [seq_blocks(group, limits.context, limits.max_step_tokens, block_size) + 1 for group in groups]
    limited = [index for index, group in enumerate(groups) if group.max_tokens is not None]
    need_bytes = sum(needs[index] * sizes[index] for index in limited)
    if len(limited) == len(groups):
        return [max(1, limits.kv_bytes * need // need_bytes) for need in needs]
    counts, typical = [0] * len(groups), ceil(limits.context * TYPICAL)
    num_seqs = max(
        1, min(limits.max_seqs, limits.kv_bytes / seq_bytes(groups, typical, limits.max_step_tokens, block_size))
    )
    for index in limited:
        counts[index] = min(equal, int(needs[index] * num_seqs))
    rest = limits.kv_bytes - sum(count * size for count, size in zip(counts, sizes, strict=True))
    rest_size = sum(size for index, size in enumerate(sizes) if index not in limited)
    return [count or max(1, rest // rest_size) for count in counts]
