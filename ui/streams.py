"""Standard streams that take every text and fail once: other encodings, closed descriptors, a full device."""

from __future__ import annotations

import io
import os
import sys


def open_streams() -> None:
    """Let every letter be read and written: those that an encoding lacks are replaced, bytes that are none are kept."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def close_output() -> None:
    """Write what is pending. Where that fails, drop it: at the interpreter's end it would fail again, with a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
