"""GGUF models of one file and of several, and the raw blocks of their tensors."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf.blocks import decode
from pitlane.engine.models.gguf.reader import read, rows
from pitlane.engine.models.registry import resolve
from tests.engine.models.gguf.model_files import convert
from tests.engine.models.gguf.raw_files import KEYS, File, key, tensor
from tests.engine.models.test_architectures import make

U16, I32 = 2, 5
NAMES = [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def split_keys(number: int, count: int = 3, num_tensors: int = 3) -> list[bytes]:
    values = (
        ("split.no", U16, "<H", number),
        ("split.count", U16, "<H", count),
        ("split.tensors.count", I32, "<i", num_tensors),
    )
    return [key(name, kind, struct.pack(code, value)) for name, kind, code, value in values]


def part(number: int, **changes: int) -> File:
    keys = [*(KEYS if number == 0 else ()), *split_keys(number, **changes)]
    return File(keys=keys, tensors=[tensor(f"tensor.{number}", (8,))], data=bytes([number] * 32))


def write(folder: Path, *parts: File) -> Path:
    for name, file in zip(NAMES, parts, strict=False):
        file.write(folder, name)
    return folder / NAMES[0]


def test_split(tmp_path: Path) -> None:
    model = read(write(tmp_path, *map(part, range(3))))
    assert [file.name for file in model.files] == NAMES
    assert model.metadata["llama.block_count"] == 1, "the metadata of the first file"
    assert [rows(model.tensors[f"tensor.{number}"], 0, 1) for number in range(3)] == [bytes([n] * 32) for n in range(3)]


def test_defects_of_a_split(tmp_path: Path) -> None:
    first = write(tmp_path, *map(part, range(3)))
    with pytest.raises(ModelError, match=r"is file 2 of 3; give the first file, model-00001-of-00003\.gguf"):
        read(tmp_path / NAMES[1])
    single = File(keys=[*KEYS, *split_keys(0)]).write(tmp_path, "renamed.gguf")
    with pytest.raises(ModelError, match="is of a model of 3 files, but its name says 1; give it its own name back"):
        read(single)
    part(2).write(tmp_path, NAMES[1])
    with pytest.raises(ModelError, match="has split.no 2, but its name says 1"):
        read(first)
    part(1, num_tensors=9).write(tmp_path, NAMES[1])
    part(0, num_tensors=9).write(tmp_path, NAMES[0])
    with pytest.raises(ModelError, match="declares 9 tensors in all files, got 3"):
        read(first)
    File(keys=split_keys(1), tensors=[tensor("tensor.0", (8,))], data=bytes(32)).write(tmp_path, NAMES[1])
    with pytest.raises(ModelError, match=r"00001-of-00003\.gguf and .*00002-of-00003\.gguf both hold tensor\.0"):
        read(first)
    (tmp_path / NAMES[2]).unlink()
    with pytest.raises(ModelError, match=r"lacks model-00003-of-00003\.gguf, one of 3 files; put all files into"):
        read(first)
    with pytest.raises(ModelError, match="lacks x-00002-of-99999.gguf"):
        read(part(0).write(tmp_path, "x-00001-of-99999.gguf"))
    with pytest.raises(ModelError, match="is file 0 of 3; give the first file"):
        read(part(0).write(tmp_path, "x-00000-of-00003.gguf"))


def test_a_split_model_equals_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make("Llama", {}, folder)
    first = convert(folder, tmp_path / "model.gguf", split=4)
    assert len(list(tmp_path.glob("*.gguf"))) > 5
    stored, expected = resolve(str(first)).weights, resolve(str(folder)).weights
    assert sorted(stored.names()) == sorted(expected.names())
    assert all(torch.equal(stored.get(name), expected.get(name)) for name in expected.names())


def test_raw_rows(tmp_path: Path) -> None:
    """Blocks of a few rows decode to the rows of the whole tensor."""
    folder = tmp_path / "folder"
    make("Llama", {"hidden_size": 256, "intermediate_size": 512}, folder)
    info = read(convert(folder, tmp_path / "model.gguf", "Q4_K")).tensors["blk.0.ffn_down.weight"]
    assert (info.shape, info.block.name, info.row_bytes) == ((256, 512), "Q4_K", 288)
    whole = decode(rows(info, 0, 256), info.block).reshape(info.shape)
    assert np.array_equal(decode(rows(info, 10, 13), info.block).reshape(3, 512), whole[10:13])
    with open(info.file, "rb+") as handle:
        handle.truncate(info.start + 1000)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        rows(info, 0, 256)
    info.file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        rows(info, 0, 256)
