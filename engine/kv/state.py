"""The layers that share a block table (`KVGroup`), the stored KV of a sequence (`KVState`), the KV in a cache (`PrefixMatch`).

Half-open token ranges: of a sequence's known tokens, `[0, num_computed_tokens)` have their KV in the store, and
`[0, num_cached_tokens)` of them came from a prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import Tensor


BLOCK_SIZE = 32  # tokens of a block


def in_blocks(num_tokens: int) -> int:
    """Round a number of tokens up to whole blocks."""
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table. window: number of tokens that a query sees, its own included; None = no limit."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * dtype.itemsize


Column: TypeAlias = tuple[int, ...]  # one block id per KV group


@dataclass(slots=True)
class PrefixMatch:
    """KV for the first tokens of a sequence.

    blocks: full blocks to share. tail: a further block, and how many of its first tokens to copy. loading: in place of blocks and
    tail, a future of saved tensors for the first `num_loading_tokens` tokens. If the future fails or gives None, the plugin is
    asked again.
    """

    blocks: list[Column] = field(default_factory=list)
    tail: tuple[Column, int] | None = None
    loading: Future[Mapping[str, Tensor] | None] | None = None
    num_loading_tokens: int = 0


@dataclass(slots=True, eq=False)
class KVState:
    """The KV of one sequence. The engine writes it; plugins read it.

    block_tables: per KV group the block ids in token order, -1 = dropped. prefix: a saved prefix that is being written into the
    store. prefix_plugin: the plugin that gave the cached tokens. scores: per KV group with an `Eviction`, the score of every held
    block at the last eviction, by its index.
    """

    block_tables: list[list[int]] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_sealed_blocks: int = 0
    prefix: PrefixMatch | None = None
    prefix_plugin: str | None = None
    scores: dict[int, dict[int, float]] = field(default_factory=dict)

    def column(self, index: int) -> Column:
        """Block `index` of every group."""
        return tuple(table[index] for table in self.block_tables)
