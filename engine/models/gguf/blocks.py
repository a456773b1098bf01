"""The tensors of a GGUF file, and the types that Pitlane decodes.

A row of a tensor is a run of blocks: `num_values` values in `num_bytes` bytes. The package `gguf` decodes the blocks of the
quantized types. Importing this module imports neither `gguf` nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class BlockType(NamedTuple):
    """number: the type's number in the file."""

    name: str
    number: int
    num_values: int
    num_bytes: int


F32, F16, BF16 = BlockType("F32", 0, 1, 4), BlockType("F16", 1, 1, 2), BlockType("BF16", 30, 1, 2)
BLOCK_TYPES: Mapping[int, BlockType] = {
    block.number: block
    for block in (
        F32,
        F16,
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ4_XS", 23, 256, 136),
        BF16,
        BlockType("MXFP4", 39, 32, 17),
    )
}
REFUSED_TYPES: Mapping[int, str] = {  # named in the message of a refusal
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is stored. shape: as in torch, the row length last. start: of its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    block: BlockType
    file: Path
    start: int

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block.num_values * self.block.num_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def decode(raw: bytes, block: BlockType) -> NDArray[np.float32]:
    """Decode whole blocks to a flat float32 array. Damaged scales give values that are not finite."""
    import numpy as np

    if block == F32:
        return np.frombuffer(raw, "<f4").astype(np.float32)
    if block == F16:
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if block == BF16:
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType(block.number))
    return values
