"""Changes of stored KV, as data: copies, loads and saves that the runner carries out in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the KV of `sources` to `targets`, slots of one group; sources are read before any target is written."""

    group: int
    sources: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """Write tokens `[start, start + n)` of saved KV into n slots of every group. tensors: `group.0`, ... [2, L, Hkv, N, D]."""

    slots: list[list[int]]
    tensors: Mapping[str, Tensor]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the KV of slots of every group into new host tensors, named as in `Load`, and call `sink` with them."""

    slots: list[list[int]]
    sink: Callable[[dict[str, Tensor]], object]


Operation: TypeAlias = Copy | Load | Save
