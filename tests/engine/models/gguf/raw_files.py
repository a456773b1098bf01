"""GGUF files written byte by byte, so that every field can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
ALIGNMENT = 32


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with its length, or with a wrong length."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    """The entry of a tensor. dims: in the order of GGUF, row length first."""
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


KEYS = (
    key("general.architecture", STRING, text("llama")),
    key("llama.block_count", U32, struct.pack("<I", 1)),
    key("a.bool", BOOL, b"\x01"),
    key("a.float", F32, struct.pack("<f", 0.5)),
    key("a.numbers", ARRAY, array(5, 3, struct.pack("<3i", -1, 0, 7))),
    key("a.texts", ARRAY, array(STRING, 2, text("x") + text("é\n"))),
)
TENSORS = (tensor("first.weight", (8, 2)), tensor("second.weight", (32, 1), kind=8, offset=64))
DATA = bytes(64 + 34)


@dataclass(frozen=True)
class File:
    """The parts of a file. `bytes(file)` joins them."""

    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    keys: Sequence[bytes] = KEYS
    tensors: Sequence[bytes] = TENSORS
    data: bytes = field(default=DATA, repr=False)

    @property
    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        start = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        return start + b"".join(self.keys) + b"".join(self.tensors)

    def __bytes__(self) -> bytes:
        header = self.header
        return header + bytes(-len(header) % ALIGNMENT) + self.data

    def write(self, folder: Path, name: str = "model.gguf") -> Path:
        file = folder / name
        file.write_bytes(bytes(self))
        return file
