"""Evicts blocks of sequences by their keys.

The choice of a plugin (`Eviction`) depends on the keys of committed tokens before a fixed place of the text. No forward has tokens
on both sides of this place (`Pool.num_before_eviction`). So the blocks that a position sees depend on the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch

from pitlane.engine.kv.pool import DROPPED, Pool
from pitlane.engine.kv.state import KVState
from pitlane.engine.kv.visibility import Eviction, evicts

if TYPE_CHECKING:
    from pitlane.engine.kv.store import KVStore


def evict_blocks(pool: Pool, stores: SequenceOf[KVStore], kv: KVState) -> None:
    """If a sequence has reached the place of an eviction, score its new blocks and release the blocks that the plugin chooses.

    Call it after every forward. Raises ValueError if the plugin breaks the contract of `Eviction`.
    """
    for group, interval in pool.intervals.items():
        if kv.num_computed_tokens % interval or not kv.num_computed_tokens:
            continue
        eviction, scores = pool.visibilities[group], kv.scores.setdefault(group, {})
        assert evicts(eviction), "the pool found its interval"
        table = kv.block_tables[group]
        for index in range(kv.num_computed_tokens // pool.block_size):
            if table[index] != DROPPED and index not in scores:
                scores[index] = float(eviction.score(_keys(stores[group], table[index], pool.block_size)))
        indices = _checked(eviction, scores, pool.block_size)
        pool.evict(kv, group, indices)
        for index in indices:
            del scores[index]


def _keys(store: KVStore, block: int, block_size: int) -> torch.Tensor:
    """The keys [L, Hkv, N, D] of a block."""
    start, stop = block * block_size, (block + 1) * block_size
    return torch.stack([store.view(layer, start, stop)[0] for layer in range(len(store.group.layers))])


def _checked(eviction: Eviction, scores: dict[int, float], block_size: int) -> list[int]:
    indices = list(eviction.evicted(scores))
    unknown = [index for index in indices if index not in scores]
    if unknown or len(set(indices)) < len(indices):
        raise ValueError(f"evicted() returned blocks {indices}; the sequence holds blocks {list(scores)}")
    num_left, limit = (len(scores) - len(indices)) * block_size, eviction.max_tokens
    if limit is not None and num_left > limit - eviction.interval:
        raise ValueError(
            f"left {num_left} tokens, and max_tokens {limit} allows {limit - eviction.interval} after an eviction"
        )
    return indices
