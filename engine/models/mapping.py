"""Give memory back to the system: pages of a mapped file, and freed memory. Linux only; elsewhere nothing happens.

A weight that was packed is not read again, but its pages count as memory of the process until the system needs room. The file stays
in the system's cache, and an address stays valid: its next read maps the page again. Memory that is no unchanged mapping of a file
would lose its contents, so `mapping_of` looks the mapping up.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

DONTNEED = 4  # MADV_DONTNEED of Linux


def mapping_of(file: Path, address: int) -> range:
    """The addresses of the mapping of a file that holds an address; empty if it is no mapping of this file."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if start <= address < end:
                return range(start, end) if len(fields) == 6 and fields[5] == str(file.resolve()) else range(0)
    return range(0)


def drop_pages(mapping: range, address: int, num_bytes: int) -> None:
    """Take the pages of [address, address + num_bytes) out of memory, as far as they lie in the mapping."""
    page = mmap.PAGESIZE
    start = max(mapping.start, address // page * page)
    end = min(mapping.stop, -(-(address + num_bytes) // page) * page)
    if start < end:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)


def trim_heap() -> None:
    """Give back freed memory, which glibc keeps for later use: around a load of SmolLM2, up to 60 MB."""
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        _libc().malloc_trim(0)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
