"""A KV group: layers that share one block table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table. window: number of tokens that a query sees, its own included; None = no limit."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * dtype.itemsize
