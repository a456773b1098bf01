"""The tensors that hold keys and values, one store per KV group.

A slot holds the KV of one token. A store knows no sequences: the pool decides which sequence owns which slot. Every store has one
more block than the pool, the null block. Padding writes into the null block, and no sequence reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from pitlane.engine.kv.operations import Copy, Load, Operation, Save
from pitlane.engine.kv.state import KVGroup


class KVStore(Protocol):
    """Keys and values of one group, in some format. A layer is an index within the group.

    format: the name that an attention declares if it reads the tensors of the store. null_block: index of the null block.
    """

    group: KVGroup
    format: str
    null_block: int

    @property
    def num_bytes(self) -> int: ...

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, Hkv, D] of one layer at slots [T]."""

    def tensors(self, layer: int) -> Any:
        """Return the tensors of one layer, in the store's format."""

    def view(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, n, D] of adjacent slots; they may be a copy."""

    def gather(self, layer: int, slots: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_seqs, Hkv, S, D] of slots [num_seqs * S], copied; valid until the next call."""

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy all layers' KV from slots to slots."""

    def export(self, slots: list[int]) -> Tensor:
        """Return the KV of n slots as a fresh host tensor [2, L, Hkv, n, D], or with the last dimension `saved_dim` of the plan."""

    def load(self, slots: list[int], saved: Tensor, start: int = 0) -> None:
        """Write tokens `[start, start + n)` of an exported tensor into n slots."""


@dataclass(frozen=True, slots=True)
class KVStorePlan:
    """A store of one group, before it takes memory.

    bytes_per_token: of all layers of the group. build(num_blocks, block_size): makes the store, with one block more than the pool.
    saved_dim: last dimension of exported tensors; None = the size of a head. whole_blocks: the stored form of a token depends on
    the other tokens of its block, so a prefix is reused in whole blocks, and no draft tree reaches beyond the block of its first
    token. fixed_bytes: memory beside the blocks. serves_trims: the store works with attention sinks and evictions: its parts read
    `GroupBatch.places`, and expect -1 for dropped blocks in a block table.
    """

    format: str
    bytes_per_token: int
    build: Callable[[int, int], KVStore]
    saved_dim: int | None = None
    whole_blocks: bool = False
    fixed_bytes: int = 0
    serves_trims: bool = False


class DenseKV:
    """The core's store. Layout `[2, L, Hkv, num_slots, D]` (2 = keys, values): adjacent slots of a head are one view."""

    format = "dense"

    def __init__(
        self, group: KVGroup, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, len(group.layers), group.num_kv_heads, (num_blocks + 1) * block_size, group.head_dim)
        self.group, self.null_block = group, num_blocks
        self.data = torch.empty(shape, dtype=dtype, device=device)  # on a CPU, untouched pages cost no memory
        self._scratch = self.data.new_empty(2, 0)

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.data[0, layer].index_copy_(1, slots, keys.transpose(0, 1))
        self.data[1, layer].index_copy_(1, slots, values.transpose(0, 1))

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, num_slots, D] of one layer."""
        return self.data[0, layer], self.data[1, layer]

    def view(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.data[0, layer, :, start:stop], self.data[1, layer, :, start:stop]

    def gather(self, layer: int, slots: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        heads, dim, count = self.group.num_kv_heads, self.group.head_dim, slots.shape[0]
        if self._scratch.shape[1] < heads * count * dim:  # kept between calls: new pages cost more time than the copy
            self._scratch = self.data.new_empty(2, heads * count * dim * 5 // 4)
        keys, values = (scratch[: heads * count * dim].view(heads, count, dim) for scratch in self._scratch)
        torch.index_select(self.data[0, layer], 1, slots, out=keys)
        torch.index_select(self.data[1, layer], 1, slots, out=values)
        return (
            keys.view(heads, num_seqs, -1, dim).transpose(0, 1),
            values.view(heads, num_seqs, -1, dim).transpose(0, 1),
        )

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self.data.index_copy_(3, self._index(targets), self.data.index_select(3, self._index(sources)))

    def export(self, slots: list[int]) -> Tensor:
        return torch.cat([self.data[:, :, :, at] for at, _ in _runs(slots)], dim=3).cpu()

    def load(self, slots: list[int], saved: Tensor, start: int = 0) -> None:
        saved = saved[:, :, :, start : start + len(slots)]
        assert saved.shape[3] == len(slots), f"KV of {saved.shape[3]} tokens for {len(slots)} slots"
        for at, part in _runs(slots):
            self.data[:, :, :, at].copy_(saved[:, :, :, part])

    def _index(self, slots: list[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.data.device)


def dense_plan(group: KVGroup, dtype: torch.dtype, device: torch.device) -> KVStorePlan:
    """Return the plan of the core's store."""

    def build(num_blocks: int, block_size: int) -> KVStore:
        return DenseKV(group, num_blocks, block_size, dtype, device)

    return KVStorePlan(DenseKV.format, group.bytes_per_token(dtype), build, serves_trims=True)


def _runs(slots: list[int]) -> list[tuple[slice, slice]]:
    """Split slots into adjacent runs: a slice of the store, and its slice of `slots`. Several times faster than an index."""
    if not slots:
        return [(slice(0), slice(0))]
    cuts = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
    return [(slice(slots[a], slots[a] + b - a), slice(a, b)) for a, b in pairwise(cuts)]


def execute(stores: Sequence[KVStore], operations: list[Operation]) -> dict[int, dict[str, Tensor]]:
    """Carry out KV operations in order. Returns the saved tensors by the key of the `Save`."""
    saved = {}
    for operation in operations:
        if isinstance(operation, Copy):
            stores[operation.group].copy(operation.sources, operation.targets)
        elif isinstance(operation, Load):
            for index, (store, slots, start) in enumerate(zip(stores, operation.slots, operation.starts, strict=True)):
                store.load(slots, operation.tensors[f"group.{index}"], start)
        elif isinstance(operation, Save):
            pairs = zip(stores, operation.slots, strict=True)
            saved[operation.key] = {f"group.{index}": store.export(slots) for index, (store, slots) in enumerate(pairs)}
    return saved
