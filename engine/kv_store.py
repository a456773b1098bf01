"""The tensors that hold keys and values, one store per KV group.

Layout `[2, L, Hkv, num_slots, D]` (2 = keys, values), so that adjacent slots of a head are one view. A store knows no
blocks and no sequences: the pool decides who owns which slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pitlane.engine.batch import Copy, Load, Operation, Save
from pitlane.engine.types import KVGroup


class KVStore:
    """Keys and values of one group: `write`, `keys`, `values`, `copy`, `export`, `load`."""

    def __init__(self, group: KVGroup, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, len(group.layers), group.num_kv_heads, num_slots, group.head_dim)
        self.group = group
        self.data = torch.empty(shape, dtype=dtype, device=device)  # untouched pages cost no memory

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, Hkv, D] of one layer (index within the group) at slots [T]."""
        self.data[0, layer].index_copy_(1, slots, keys.transpose(0, 1))
        self.data[1, layer].index_copy_(1, slots, values.transpose(0, 1))

    def view(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, n, D] of adjacent slots, without a copy."""
        return self.data[0, layer, :, start:stop], self.data[1, layer, :, start:stop]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy all layers' KV from slots to slots."""
        self.data.index_copy_(3, self._index(targets), self.data.index_select(3, self._index(sources)))

    def export(self, slots: list[int]) -> Tensor:
        """KV of n slots as a fresh host tensor [2, L, Hkv, n, D]."""
        return self.data.index_select(3, self._index(slots)).cpu()

    def load(self, slots: list[int], saved: Tensor) -> None:
        """Write an exported tensor back into slots."""
        self.data.index_copy_(3, self._index(slots), saved.to(self.data.device, self.data.dtype))

    def _index(self, slots: list[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.data.device)


def execute(stores: list[KVStore], operations: list[Operation]) -> None:
    """Carry out KV operations in order."""
    for operation in operations:
        if isinstance(operation, Copy):
            stores[operation.group].copy(operation.sources, operation.targets)
        elif isinstance(operation, Load):
            for index, (store, slots) in enumerate(zip(stores, operation.slots, strict=True)):
                store.load(slots, operation.tensors[f"group.{index}"])
        elif isinstance(operation, Save):
            operation.sink(
                {f"group.{i}": s.export(n) for i, (s, n) in enumerate(zip(stores, operation.slots, strict=True))}
            )
