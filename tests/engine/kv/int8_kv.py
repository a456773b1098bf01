"""A plugin with an int8 KV store, as a stranger would write it: one scale per token and head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pitlane import BuildContext, KVGroup, KVStorePlan, Plugin, hookimpl


class Int8Store:
    """Layout as in the dense store, [2, L, Hkv, num_slots, D], with scales [2, L, Hkv, num_slots, 1]."""

    format = "int8"

    def __init__(self, group: KVGroup, num_blocks: int, block_size: int, context: BuildContext) -> None:
        self.group, self.null_block, self.dtype = group, num_blocks, context.dtype
        shape = (2, len(group.layers), group.num_kv_heads, (num_blocks + 1) * block_size)
        self.data = torch.empty(*shape, group.head_dim, dtype=torch.int8, device=context.device)
        self.scales = torch.empty(*shape, 1, dtype=torch.float32, device=context.device)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self._store(layer, slots, torch.stack((keys, values)).transpose(1, 2))

    def _store(self, layer: int | slice, slots: Tensor, x: Tensor) -> None:
        scales = (x.abs().amax(-1, keepdim=True) / 127).float().clamp_min(1e-30)
        self.data[:, layer][..., slots, :] = (x / scales).round().clamp(-127, 127).to(torch.int8)
        self.scales[:, layer][..., slots, :] = scales

    def _dense(self, layer: int | slice, slots: slice | Tensor) -> Tensor:
        return (self.data[:, layer][..., slots, :].to(self.dtype) * self.scales[:, layer][..., slots, :]).to(self.dtype)

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.data[:, layer], self.scales[:, layer]

    def view(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = self._dense(layer, slice(start, stop))
        return keys, values

    def gather(self, layer: int, slots: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        heads, count, dim = self.data.shape[2], len(slots) // num_seqs, self.data.shape[4]
        keys, values = (x.view(heads, num_seqs, count, dim).transpose(0, 1) for x in self._dense(layer, slots))
        return keys, values

    def copy(self, sources: list[int], targets: list[int]) -> None:
        for tensor in (self.data, self.scales):
            tensor[:, :, :, targets] = tensor[:, :, :, sources]

    def export(self, slots: list[int]) -> Tensor:
        return self._dense(slice(None), torch.tensor(slots, dtype=torch.int64)).cpu()

    def load(self, slots: list[int], saved: Tensor, start: int = 0) -> None:
        part = saved[:, :, :, start : start + len(slots)]
        self._store(slice(None), torch.tensor(slots, dtype=torch.int64), part.to(self.data.device))


class Int8KV(Plugin):
    name, role, exactness = "int8_kv", "kv_store", "approximate"

    @hookimpl
    def build_kv_store(self, group: KVGroup, context: BuildContext) -> KVStorePlan:
        bytes_per_token = 2 * len(group.layers) * group.num_kv_heads * (group.head_dim + 4)
        return KVStorePlan("int8", bytes_per_token, lambda count, size: Int8Store(group, count, size, context))


def relative_errors(stored: Tensor, exact: Tensor) -> Iterable[float]:
    """The errors of vectors [..., D], as a part of the largest magnitude of the vector."""
    scale = exact.abs().amax(-1, keepdim=True)
    errors: list[float] = ((stored - exact).abs() / scale).flatten().tolist()
    return errors
