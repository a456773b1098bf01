"""Reads the header of one GGUF file, versions 2 and 3, little endian: metadata and the places of the tensors.

Layout: magic, version, number of tensors, number of keys; per key its name, type and value; per tensor its name, shape, type and
offset; padding to the alignment; the data. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A file may be hostile. Every count, length and range is checked against the file before memory is taken for it, and the whole
header is checked before the first value is decoded. A refusal is a ModelError of one line. Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TypeAlias

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import escaped
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES, REFUSED_TYPES, BlockType, TensorInfo

Value: TypeAlias = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER = 2**25  # bytes; the largest known header has 16 MB
MAX_KEYS, MAX_TENSORS = 2**12, 2**14
MAX_NUMBERS, MAX_STRINGS = (
    2**22,
    2**20,
)  # in all arrays; the largest known vocabulary has 262,144 tokens and 514,906 merges
MAX_DIMS, MAX_NAME = 4, 256
STRING, ARRAY = 8, 9
FORMATS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MIN_KEY, MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of the shortest entry
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: the values by key, in the order of the file."""

    metadata: dict[str, Value]
    tensors: list[TensorInfo]


def read_header(file: Path) -> Header:
    """Read the header of one file. Raises ModelError."""
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            return _Parser(file, handle.read(MAX_HEADER), size).header()
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); restore it or download it again") from None


class _Parser:
    """A cursor `at` over the first bytes of a file of `size` bytes."""

    def __init__(self, file: Path, data: bytes, size: int) -> None:
        self.file, self.data, self.size, self.at = file, data, size, 0
        self.places: dict[str, tuple[int, int]] = {}  # key -> type of its value, place of the value
        self.num_numbers = self.num_strings = 0

    def header(self) -> Header:
        try:
            num_tensors, num_keys = self._start()
            for _ in range(num_keys):
                self._key()
            infos = [self._tensor() for _ in range(num_tensors)]
        except struct.error:
            self._refuse_short()
        tensors = self._placed(infos)
        return Header({key: self._value(*place) for key, place in self.places.items()}, tensors)

    def _start(self) -> tuple[int, int]:
        """The number of tensors and of keys."""
        if self.data[:4] != MAGIC[: self.size] and self.data[:4] != MAGIC[::-1]:
            self._refuse(f"is no GGUF file: it starts with {escaped(repr(self.data[:4]))}, not {MAGIC!r}")
        self.at = 4
        version = self._unpack("I")
        if self.data[:4] != MAGIC or (version and version & 0xFFFF == 0):
            raise UnsupportedModel(f"{self.file} is a big-endian GGUF file; convert the model again as little endian")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise UnsupportedModel(
                f"{self.file} has GGUF version {version}, versions {known} are read; convert it again"
            )
        num_tensors, num_keys = self._unpack("Q"), self._unpack("Q")
        self._check_count(num_tensors, "tensors", MIN_TENSOR, MAX_TENSORS)
        self._check_count(num_keys, "metadata keys", MIN_KEY, MAX_KEYS)
        return num_tensors, num_keys

    def _key(self) -> None:
        name = self._name("metadata key")
        if name in self.places:
            self._refuse(f"has two metadata keys {escaped(name)}")
        kind = self._unpack("I")
        self.places[name] = kind, self.at
        self._skip(name, kind)

    def _skip(self, name: str, kind: int) -> None:
        """Check a value, and move behind it. Takes no memory."""
        if kind in FORMATS:
            self._advance(struct.calcsize(FORMATS[kind]))
        elif kind == STRING:
            self._advance(self._unpack("Q"))
        elif kind == ARRAY:
            kind, count = self._unpack("I"), self._unpack("Q")
            if kind == ARRAY:
                self._refuse(f"holds an array of arrays in {escaped(name)}; only plain arrays are read")
            if kind == STRING:
                self.num_strings += self._check_count(count, f"strings in {escaped(name)}", 8, MAX_STRINGS)
                self._skip_strings(count)
            else:
                width = struct.calcsize(self._format(name, kind))
                self.num_numbers += self._check_count(count, f"numbers in {escaped(name)}", width, MAX_NUMBERS)
                self._advance(count * width)
            if self.num_strings > MAX_STRINGS or self.num_numbers > MAX_NUMBERS:
                limits = f"{MAX_STRINGS:,} strings and {MAX_NUMBERS:,} numbers"
                self._refuse(f"has arrays of more than {limits}; reached in {escaped(name)}")
        else:
            self._format(name, kind)

    def _skip_strings(self, count: int) -> None:
        data, at, end = self.data, self.at, len(self.data)
        for _ in range(count):
            at += 8 + LENGTH.unpack_from(data, at)[0]
            if at > end:
                self._refuse_short()
        self.at = at

    def _format(self, name: str, kind: int) -> str:
        if kind not in FORMATS:
            self._refuse(f"has a value of type {kind} in {escaped(name)}, types 0 to 12 are known")
        return FORMATS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._name("tensor name")
        num_dims = self._unpack("I")
        if not 1 <= num_dims <= MAX_DIMS:
            self._refuse(f"has {num_dims:,} dimensions in tensor {escaped(name)}, must be 1 to {MAX_DIMS}")
        shape = tuple(self._unpack("Q") for _ in range(num_dims))[::-1]
        number, offset = self._unpack("I"), self._unpack("Q")
        block = BLOCK_TYPES.get(number)
        if block is None:
            kind = f"{number} ({REFUSED_TYPES[number]})" if number in REFUSED_TYPES else str(number)
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise UnsupportedModel(
                f"{self.file}: tensor {escaped(name)} has type {kind}, which is not supported; "
                f"choose a file of another quantization; known: {known}"
            )
        if min(shape) < 1 or shape[-1] % block.num_values:
            rows = f"rows of a multiple of {block.num_values} values" if block.num_values > 1 else "no empty dimension"
            self._refuse(f"has shape {shape} in tensor {escaped(name)}, {block.name} needs {rows}")
        return name, shape, block, offset

    def _placed(self, infos: list[tuple[str, tuple[int, ...], BlockType, int]]) -> list[TensorInfo]:
        """The tensors with their places, in the order of the file. Checks alignment, range, overlap and names."""
        end, alignment = self.at, self._alignment()
        data_start = -(-end // alignment) * alignment
        tensors = []
        for name, shape, block, offset in infos:
            info = TensorInfo(name, shape, block, self.file, data_start + offset)
            if offset % alignment:
                self._refuse(f"has offset {offset:,} in tensor {escaped(name)}, must be a multiple of {alignment}")
            if info.start + info.num_bytes > self.size:
                span = f"{info.num_bytes:,} bytes from {info.start:,} on"
                self._refuse(f"has {self.size:,} bytes, but tensor {escaped(name)} takes {span}: it is truncated")
            tensors.append(info)
        for first, second in pairwise(sorted(tensors, key=lambda info: info.start)):
            if first.start + first.num_bytes > second.start:
                self._refuse(f"has overlapping tensors {escaped(first.name)} and {escaped(second.name)}")
        names = [info.name for info in tensors]
        for first_name, second_name in pairwise(sorted(names)):
            if first_name == second_name:
                self._refuse(f"has two tensors {escaped(first_name)}")
        return tensors

    def _alignment(self) -> int:
        kind, place = self.places.get("general.alignment", (4, -1))
        value = 32 if place < 0 else self._value(kind, place)
        if not isinstance(value, int) or not 8 <= value <= 2**16 or value & (value - 1):
            self._refuse(f"has general.alignment {escaped(repr(value))}, must be a power of two from 8 to {2**16}")
        return int(value)

    def _value(self, kind: int, place: int) -> Value:
        """Decode a value that `_skip` has checked."""
        self.at = place
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            value: Value = self._unpack(FORMATS[kind])
            return value
        kind, count = self._unpack("I"), self._unpack("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        return list(struct.unpack_from(f"<{count}{FORMATS[kind]}", self.data, self.at))

    def _string(self) -> str:
        length = self._unpack("Q")
        start = self.at
        self._advance(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            self._refuse(f"holds text that is not UTF-8 at byte {start:,}")

    def _name(self, what: str) -> str:
        length = self._unpack("Q")
        if not 1 <= length <= MAX_NAME:
            self._refuse(f"has a {what} of {length:,} bytes, must be 1 to {MAX_NAME}")
        self.at -= LENGTH.size
        return self._string()

    def _unpack(self, code: str) -> int:
        """One number. Raises struct.error at the end of the data."""
        value: int = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def _advance(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            self._refuse_short()
        self.at += num_bytes

    def _check_count(self, count: int, what: str, min_bytes: int, limit: int) -> int:
        left = self.size - self.at
        if count > left // min_bytes:
            self._refuse(f"declares {count:,} {what}, but has only {left:,} bytes left for them")
        if count > limit:
            self._refuse(f"declares {count:,} {what}, at most {limit:,} are read")
        return count

    def _refuse_short(self) -> NoReturn:
        if self.size > len(self.data):
            self._refuse(f"has a header of more than {MAX_HEADER:,} bytes")
        self._refuse(f"is truncated: it ends at byte {self.size:,}, inside its header")

    def _refuse(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.file} {problem}; download it again")
