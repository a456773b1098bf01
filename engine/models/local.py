"""Models of the data folder: files fetched from the package index, and decoded copies of GGUF files. List them, remove them."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.engine.models.wheel import PINS, PREFIX, RECORD, Pin, cached, find_pin, models_folder, with_record
from pitlane.storage.errors import reason_of
from pitlane.storage.home import home

DECODED_RECORD = "gguf.json"  # of engine/models/gguf/folder.py: the GGUF files that a folder was made of


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model of the package index. path: its file; None: it is not on this machine. num_bytes: of the file."""

    name: str
    path: Path | None
    num_bytes: int
    licence: str
    description: str


@dataclass(frozen=True, slots=True)
class DecodedModel:
    """A folder with the decoded copy of a GGUF file; Pitlane makes it again when it is missing.

    source: the path of the GGUF file. sha256: of the GGUF file, or of each file of a split.
    """

    name: str
    path: Path
    num_bytes: int
    source: str
    sha256: tuple[str, ...]


def wheel_models() -> list[WheelModel]:
    """The models that are known by a short name, fetched or not, then the fetched models of other distributions, by name."""
    pins = list(PINS.values())
    for record in sorted(models_folder().glob(f"*==*/{RECORD}")):
        pin = find_pin(PREFIX + record.parent.name)
        if pin is not None and pin not in pins and cached(pin) is not None:
            pins.append(pin)
    return [_model(pin) for pin in pins]


def decoded_models() -> list[DecodedModel]:
    """The decoded copies of GGUF files, by name."""
    folders = sorted((home() / "cache" / "gguf").glob(f"*/{DECODED_RECORD}"))
    return [_decoded(record.parent) for record in folders if not record.parent.name.startswith(".")]


def remove_wheel_model(pin: Pin) -> int:
    """Delete the file of a pin and its decoded copies; return the number of bytes freed.

    The hash of an unpinned file stays, so that a later fetch must give the same file.
    """
    pin, file = with_record(pin), cached(pin)
    if file is None:
        names = ", ".join(model.name for model in wheel_models() if model.path is not None)
        raise ModelError(f"{pin.name} is not on this machine; fetched: {names or 'none'}")
    copies = [model.path for model in decoded_models() if model.sha256 == (pin.member_sha256,)]
    freed = sum(map(_removed, [file, *copies]))
    with suppress(OSError):  # the folder of an unpinned file holds its hash
        file.parent.rmdir()
    return freed


def remove_decoded_model(name: str) -> int:
    """Delete a decoded copy; return the number of bytes freed."""
    for model in decoded_models():
        if model.name == name:
            return _removed(model.path)
    raise ModelError(f"no decoded model {name!r}; decoded: {', '.join(m.name for m in decoded_models()) or 'none'}")


def _model(pin: Pin) -> WheelModel:
    file = cached(pin)
    num_bytes = file.stat().st_size if file is not None else pin.num_bytes
    return WheelModel(pin.name, file, num_bytes, pin.licence, pin.description)


def _decoded(folder: Path) -> DecodedModel:
    files, digests = [""], []
    with suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads((folder / DECODED_RECORD).read_text(encoding="utf-8"))
        files, digests = list(map(str, record["files"])) or files, list(map(str, record["sha256"]))
    return DecodedModel(folder.name, folder, _num_bytes(folder), files[0], tuple(digests))


def _removed(path: Path) -> int:
    freed = _num_bytes(path)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise ModelError(f"{path} cannot be removed: {reason_of(error)}") from None
    return freed


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
