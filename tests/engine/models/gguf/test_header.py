"""Headers of GGUF files: all kinds of values, and hostile files, which are refused in one line, at once and without memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES
from pitlane.engine.models.gguf.header import MAX_HEADER, MAX_KEYS, MAX_STRINGS, MAX_TENSORS, read_header
from tests.engine.models.gguf.raw_files import (
    ARRAY,
    DATA,
    KEYS,
    STRING,
    TENSORS,
    U32,
    U64,
    File,
    array,
    key,
    tensor,
    text,
)

HUGE = 2**60
MAX_SECONDS, MAX_MEMORY = 0.5, 50e6


def refused(file: Path, words: str) -> None:
    """The file is refused with these words in one line, with little time and memory."""
    start = time.process_time()
    with pytest.raises(ModelError, match=words) as error:
        read_header(file)
    assert time.process_time() - start < MAX_SECONDS
    message = str(error.value)
    assert message.startswith(str(file)) and message.isprintable() and len(message) < 600
    assert "; " in message, "it must say what to do"
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_places(version: int, tmp_path: Path) -> None:
    kinds = "BbHhIif?  Qqd"
    values = [200, -100, 60000, -30000, 2**32 - 1, -(2**31), 0.5, True, None, None, 2**64 - 1, -(2**63), 1e300]
    keys = [
        key(f"n.{kind}", kind, struct.pack(f"<{code}", values[kind])) for kind, code in enumerate(kinds) if code != " "
    ]
    header = read_header(File(version=version, keys=[*KEYS, *keys]).write(tmp_path))
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "a.bool": True,
        "a.float": 0.5,
        "a.numbers": [-1, 0, 7],
        "a.texts": ["x", "é\n"],
        **{f"n.{kind}": value for kind, value in enumerate(values) if value is not None},
    }
    first, second = header.tensors
    data_start = (tmp_path / "model.gguf").stat().st_size - len(DATA)
    assert (first.name, first.shape, first.block.name, first.start, first.num_bytes) == (
        "first.weight",
        (2, 8),
        "F32",
        data_start,
        64,
    )
    assert (second.name, second.shape, second.block.name, second.start, second.num_bytes) == (
        "second.weight",
        (1, 32),
        "Q8_0",
        data_start + 64,
        34,
    )


def test_alignment(tmp_path: Path) -> None:
    file = File(keys=[*KEYS, key("general.alignment", U32, struct.pack("<I", 8))])
    raw = file.header + bytes(-len(file.header) % 8) + DATA
    (tmp_path / "model.gguf").write_bytes(raw)
    assert read_header(tmp_path / "model.gguf").tensors[0].start == len(raw) - len(DATA)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    whole, file = bytes(File()), tmp_path / "model.gguf"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"truncated|is no GGUF|declares .* bytes left") as error:
            read_header(file)
        assert str(error.value).isprintable()


def test_damaged_bytes(tmp_path: Path) -> None:
    """Whatever the damage, a header is read or refused by a ModelError."""
    whole, file, generator, num_refused = bytes(File()), tmp_path / "model.gguf", random.Random(0), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            damaged[generator.randrange(len(File().header))] = generator.choice((0, 1, 9, 0x7F, 0xFF))
        file.write_bytes(damaged)
        try:
            read_header(file)
        except ModelError as error:
            num_refused += 1
            assert str(error).isprintable()
    assert 200 < num_refused < 1000


def with_key(value: bytes, kind: int = ARRAY, name: str | bytes = "bad.key") -> File:
    return File(keys=[*KEYS, key(name, kind, value)])


def with_tensor(entry: bytes) -> File:
    return File(tensors=[*TENSORS, entry], data=bytes(160))


STRINGS = text("") * 40
REFUSED: dict[str, tuple[File, str]] = {
    "no magic": (File(magic=b"PK\x03\x04"), r"is no GGUF file: it starts with .*PK.*, not b'GGUF'"),
    "big endian": (File(version=3 << 24), "is a big-endian GGUF file; convert"),
    "magic of the other endian": (File(magic=b"FUGG"), "is a big-endian GGUF file; convert"),
    "version 0": (File(version=0), "has GGUF version 0, versions 2 and 3 are read"),
    "version 1": (File(version=1), "has GGUF version 1"),
    "version 4": (File(version=4), "has GGUF version 4"),
    "keys": (File(num_keys=HUGE), r"declares 1,152,\d.* metadata keys, but has only .* bytes left"),
    "tensors": (File(num_tensors=HUGE), r"declares 1,152,\d.* tensors, but has only .* bytes left"),
    "one key too many": (File(num_keys=len(KEYS) + 1), "truncated|type|bytes left|must be 1 to"),
    "numbers": (with_key(array(U32, HUGE)), r"declares 1,152,\d.* numbers in bad\.key, but has only"),
    "bytes": (with_key(array(0, 5000)), r"declares 5,000 numbers in bad\.key, but has only"),
    "strings": (with_key(array(STRING, HUGE, STRINGS)), r"declares 1,152,\d.* strings in bad\.key"),
    "one string too many": (with_key(array(STRING, 41, STRINGS)), "truncated|dimensions|must be 1 to"),
    "string": (with_key(text("x", HUGE), STRING), "is truncated"),
    "string in an array": (with_key(array(STRING, 2, text("x") + text("y", HUGE))), "is truncated"),
    "string of 2^64 - 1": (with_key(text("x", 2**64 - 1), STRING), "is truncated"),
    "nested array": (with_key(array(ARRAY, 1, array(U32, 1, bytes(4)))), r"array of arrays in bad\.key; only plain"),
    "kind of value": (with_key(bytes(8), 13), r"value of type 13 in bad\.key, types 0 to 12 are known"),
    "kind in an array": (with_key(array(77, 1, bytes(8))), r"value of type 77 in bad\.key"),
    "text": (with_key(text(b"\xff\xfe"), STRING), "not UTF-8 at byte"),
    "text in an array": (with_key(array(STRING, 1, text(b"\xc3"))), "not UTF-8 at byte"),
    "name of a key": (with_key(bytes(4), U32, b"\xff"), "not UTF-8"),
    "empty name": (with_key(bytes(4), U32, ""), "metadata key of 0 bytes, must be 1 to 256"),
    "long name": (with_key(bytes(4), U32, "n" * 257), "metadata key of 257 bytes, must be 1 to 256"),
    "two keys": (with_key(bytes(4), U32, "a.bool"), r"two metadata keys a\.bool; download"),
    "control characters": (with_key(bytes(8), 13, "a\x1b[31m\n"), r"in a\\x1b\[31m\\n, types"),
    "alignment 0": (with_key(struct.pack("<I", 0), U32, "general.alignment"), "general.alignment 0, must be a power"),
    "alignment 48": (with_key(struct.pack("<I", 48), U32, "general.alignment"), "general.alignment 48, must be"),
    "alignment 2^30": (with_key(struct.pack("<I", 2**30), U32, "general.alignment"), "general.alignment 1073741824"),
    "alignment 2^63": (with_key(struct.pack("<Q", 2**63), U64, "general.alignment"), "general.alignment 92233"),
    "alignment of text": (with_key(text("x"), STRING, "general.alignment"), "general.alignment 'x', must be"),
    "no dimension": (with_tensor(tensor("bad", ())), "has 0 dimensions in tensor bad, must be 1 to 4"),
    "five dimensions": (with_tensor(tensor("bad", (1,) * 5)), "has 5 dimensions in tensor bad"),
    "2^31 dimensions": (with_tensor(tensor("bad", (1,), num_dims=2**31)), "has 2,147,483,648 dimensions"),
    "dimension 0": (with_tensor(tensor("bad", (8, 0))), r"has shape \(0, 8\) in tensor bad, F32 needs no empty"),
    "part of a block": (with_tensor(tensor("bad", (40, 1), kind=8)), "Q8_0 needs rows of a multiple of 32 values"),
    "type": (with_tensor(tensor("bad", (8,), kind=999)), "tensor bad has type 999, which is not supported; .*Q4_K"),
    "named type": (with_tensor(tensor("bad", (256,), kind=16)), r"has type 16 \(IQ2_XXS\), which is not supported"),
    "removed type": (with_tensor(tensor("bad", (32,), kind=4)), "has type 4, which"),
    "range behind the end": (
        with_tensor(tensor("bad", (64,), offset=128)),
        "tensor bad takes 256 bytes from .* truncat",
    ),
    "offset behind the end": (with_tensor(tensor("bad", (8,), offset=HUGE)), "tensor bad takes 32 bytes from 1,152,"),
    "offset of 2^64 - 32": (with_tensor(tensor("bad", (8,), offset=2**64 - 32)), "tensor bad takes 32 bytes from 18,4"),
    "size over 2^64": (with_tensor(tensor("bad", (2**62, 2**62))), "tensor bad takes 8507059.*|tensor bad takes 85,0"),
    "odd offset": (with_tensor(tensor("bad", (1,), offset=8)), "has offset 8 in tensor bad, must be a multiple of 32"),
    "overlap": (with_tensor(tensor("bad", (8,), offset=32)), r"overlapping tensors first\.weight and bad; download"),
    "same place": (with_tensor(tensor("bad", (8,), offset=0)), "overlapping tensors"),
    "two names": (with_tensor(tensor("first.weight", (1,), offset=128)), r"has two tensors first\.weight"),
    "empty tensor name": (with_tensor(tensor("", (1,), offset=96)), "tensor name of 0 bytes"),
    "long tensor name": (with_tensor(tensor("n" * 300, (1,), offset=96)), "tensor name of 300 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    file, words = REFUSED[case]
    refused(file.write(tmp_path), words)


def sparse(folder: Path, file: File, size: int = 2**33) -> Path:
    """The file with a hole at its end: large, and no room on the disk."""
    path = file.write(folder)
    with open(path, "rb+") as handle:
        handle.truncate(size)
    return path


LARGE: dict[str, tuple[Callable[[], File], str]] = {
    "keys": (lambda: File(num_keys=MAX_KEYS + 1), "declares 4,097 metadata keys, at most 4,096 are read"),
    "tensors": (lambda: File(num_tensors=MAX_TENSORS + 1), "declares 16,385 tensors, at most 16,384"),
    "strings": (lambda: with_key(array(STRING, MAX_STRINGS + 1)), "declares 1,048,577 strings"),
    "numbers": (lambda: with_key(array(0, 2**23)), "declares 8,388,608 numbers"),
    "strings in two arrays": (
        lambda: File(keys=[key(f"k{i}", ARRAY, array(STRING, 2**19, bytes(2**22))) for i in range(3)]),
        "arrays of more than 1,048,576 strings and 4,194,304 numbers; reached in k2",
    ),
    "text": (lambda: with_key(text("x", 2**32), STRING), f"has a header of more than {MAX_HEADER:,} bytes"),
    "last string": (
        lambda: with_key(array(STRING, MAX_STRINGS - 9, text("y" * 10) * (MAX_STRINGS - 10) + text("z", 2**40))),
        "has a header of more than",
    ),
}
DEAR = {"strings in two arrays", "last string"}  # a million strings are read before the file is refused


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in DEAR)) for case in LARGE])
def test_hostile_large_files(case: str, tmp_path: Path) -> None:
    make, words = LARGE[case]
    refused(sparse(tmp_path, make()), words)


def test_a_file_of_49_bytes_that_declares_300000_elements(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", ARRAY, array(STRING, 300_000)))
    refused(file, "declares 300,000 strings in k, but has only 0 bytes left")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match=r"cannot be read \(.*\); restore it"):
            read_header(path)
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "is truncated: it ends at byte 0")


def test_sizes_are_those_of_the_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for block in BLOCK_TYPES.values():
        kind = GGMLQuantizationType(block.number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (block.name, (block.num_values, block.num_bytes))
