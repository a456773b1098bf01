"""Standard streams with any encoding, closed descriptors or a full device: every text passes, and an error comes once."""

from __future__ import annotations

import io
import os
import sys


def open_streams() -> None:
    """Make the standard streams take every text. Letters without a code are replaced; invalid bytes of the input are kept."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def close_output() -> None:
    """Flush standard output. If this fails, drop its buffer: the interpreter would fail on it again, with a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
