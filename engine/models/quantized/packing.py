"""How a quantized checkpoint stores the weight of a linear (`Packing`), and the stored numbers (`PackedWeight`), for all formats.

Integers: W = scale * (n - zero), with n in [0, 2^bits). Float8: W = scale * n. A scale serves `rows` outputs and `group_size`
inputs. Shapes: N outputs, K inputs, G groups of inputs. Knows no file and no format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Packing:
    """How a linear is stored. Known from the config and the headers of the files alone.

    method: the format. bits: per number; 8 for float8. rows, group_size: outputs and inputs that share a scale. symmetric: all
    zeros are 2^(bits - 1). is_float: the numbers are float8 (e4m3). is_permuted: an input may belong to any group (act-order).
    """

    method: str
    bits: int
    group_size: int
    rows: int = 1
    symmetric: bool = True
    is_float: bool = False
    is_permuted: bool = False

    def __str__(self) -> str:
        kind = "float8" if self.is_float else f"{self.bits} bits"
        details = [f"groups of {self.group_size}", "" if self.symmetric else "zero points"]
        details.append("act-order" if self.is_permuted else "")
        return f"{kind}, {', '.join(filter(None, details))}"


class PackedWeight(NamedTuple):
    """The stored numbers of a weight [N, K].

    numbers: uint8 [N, K], or float8 [N, K]. scales: [ceil(N / rows), G], finite. zeros: int16 [N, G]; None: 2^(bits - 1).
    groups: the group of every input, int64 [K]; None: input k is in group k // group_size.
    """

    packing: Packing
    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight [N, K] in float32, then round it to a dtype."""
        packing = self.packing
        rows, inputs = self.numbers.shape
        groups = torch.arange(inputs) // packing.group_size if self.groups is None else self.groups
        wide = torch.empty(rows, inputs, dtype=dtype)
        step = max(packing.rows, 2**22 // inputs // packing.rows * packing.rows)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            lines = torch.arange(first, last) // packing.rows
            part = self.numbers[first:last].float()
            if not packing.is_float:
                zeros = 2.0 ** (packing.bits - 1) if self.zeros is None else self.zeros[first:last].float()[:, groups]
                part -= zeros
            wide[first:last] = part * self.scales.float()[lines][:, groups]
        return wide


class PackedTensors(Mapping[str, Tensor]):
    """The tensors of a linear of a quantized checkpoint: the packed weight, and by name the tensors that are not packed.

    `["weight"]` decodes the weight to the dtype of the checkpoint. Every access decodes again, so no dense copy stays in memory.
    """

    def __init__(self, packed: Callable[[], PackedWeight], dtype: torch.dtype, plain: Mapping[str, Tensor]) -> None:
        self._packed, self._dtype, self._plain = packed, dtype, plain

    @property
    def packed(self) -> PackedWeight:
        return self._packed()

    def __getitem__(self, name: str) -> Tensor:
        return self._packed().dense(self._dtype) if name == "weight" else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["weight", *self._plain])

    def __len__(self) -> int:
        return 1 + len(self._plain)
