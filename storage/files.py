"""Files that appear whole or not at all: written under a temporary name in the same folder, synced, and renamed.

A reader sees the former file or the new file. A process that is killed leaves at most a file with a temporary name.
`write_whole` takes bytes or a text. `replacing` serves writers that need a path, such as safetensors. Knows no contents.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes | str, temporary: Path | None = None) -> None:
    """Write a file in one step. Raises OSError; the former file then stays. temporary: as in `replacing`."""
    with replacing(path, temporary) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to. At the end, sync the file and rename it to `path`; after an error, delete it.

    temporary: in the folder of `path`; None: `.<name>.<random>.<process>`.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}") if temporary is None else temporary
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; does nothing on Windows, which cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
