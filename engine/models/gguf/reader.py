"""Reads GGUF models: the metadata, and the places of the raw blocks of every tensor. A model is one file or a split.

A split is `<name>-00001-of-00003.gguf` and so on; its first file holds the metadata. A plugin that keeps the blocks packed finds
them here: `gguf.json` in the model folder (`ModelSource.folder`) names the files, `read(file).tensors[name]` says type and place of
a tensor, and `rows` reads its blocks. The names of tensors are those of GGUF (`names.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config_file import escaped, short
from pitlane.engine.models.gguf.blocks import TensorInfo
from pitlane.engine.models.gguf.header import Header, Value, read_header

SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class GGUF:
    """A GGUF model. metadata: the values by key. tensors: by their names in the file."""

    files: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether the name of a path is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def split_files(file: Path) -> tuple[Path, ...]:
    """All files of the model whose first file is given. Raises ModelError if it is not the first file, or a file is missing."""
    match = SPLIT.fullmatch(file.name)
    if match is None:
        return (file,)
    stem, number, count = match[1], int(match[2]), int(match[3])
    names = [f"{stem}-{index:05}-of-{match[3]}{file.suffix}" for index in range(1, count + 1)]
    if number != 1:
        raise ModelError(
            f"{file} is file {number:,} of {count:,}; give the first file, {stem}-00001-of-{match[3]}.gguf"
        )
    for name in names:
        if not file.with_name(name).is_file():
            raise ModelError(f"{file} lacks {name}, one of {count:,} files; put all files into one folder")
    return tuple(map(file.with_name, names))


def read(file: Path) -> GGUF:
    """Read the headers of all files of a model. Raises ModelError."""
    files = split_files(file)
    headers = [read_header(part) for part in files]
    for index, (part, header) in enumerate(zip(files, headers, strict=True)):
        _check_split(part, header, index, len(files))
    tensors: dict[str, TensorInfo] = {}
    for info in (info for header in headers for info in header.tensors):
        if info.name in tensors:
            raise ModelError(
                f"{tensors[info.name].file} and {info.file} both hold {escaped(info.name)}; download them again"
            )
        tensors[info.name] = info
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if len(files) > 1 and expected != len(tensors):
        raise ModelError(
            f"{file} declares {short(expected)} tensors in all files, got {len(tensors)}; download them again"
        )
    return GGUF(files, headers[0].metadata, tensors)


def rows(info: TensorInfo, start: int, stop: int) -> bytes:
    """Read the raw blocks of the rows [start, stop) of a tensor. Raises ModelError."""
    num_bytes = (stop - start) * info.row_bytes
    try:
        with open(info.file, "rb") as handle:
            handle.seek(info.start + start * info.row_bytes)
            raw = handle.read(num_bytes)
    except OSError as error:
        raise ModelError(f"{info.file} cannot be read ({error.strerror}); restore it or download it again") from None
    if len(raw) != num_bytes:
        raise ModelError(f"{info.file} became shorter while it was read; download it again")
    return raw


def _check_split(part: Path, header: Header, index: int, count: int) -> None:
    declared = header.metadata.get("split.count", 0) or 1
    if declared != count:
        raise ModelError(
            f"{part} is of a model of {short(declared)} files, but its name says {count:,}; give it its own name "
            "back, like model-00001-of-00003.gguf"
        )
    if count > 1 and header.metadata.get("split.no") != index:
        number = short(header.metadata.get("split.no"))
        raise ModelError(f"{part} has split.no {number}, but its name says {index}; give it its own name back")
