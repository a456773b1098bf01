"""The child process that reads one file into a document: one JSON request on stdin, one JSON answer on stdout.

It loads the plugins, limits its own memory and processor time, and calls the `load_document` hook. First of all it
moves standard output aside for the answer, so that a plugin may print. Imports no torch: it starts in 0.15 s.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

from pitlane.storage.errors import DocumentError
from pitlane.storage.types import Document


def main() -> int:
    """Answer the request. A failure is an answer too: the parent process shows it."""
    output = _claim_stdout()
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"document": _encode(read(request))}
    except DocumentError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"needs more than {request['memory_bytes'] / (1 << 30):.1f} GiB of memory to read; split it"}
    except Exception as error:
        answer = {"error": f"cannot be read ({type(error).__name__}: {error}); save it anew or try another loader"}
    output.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace"))
    output.close()
    return 0


def read(request: dict[str, Any]) -> Document:
    """Read the file with the first loader that takes it. Raises DocumentError beyond the limits of the request."""
    from pitlane.engine.plan.registry import PluginRegistry

    registry = PluginRegistry.load(request["plugins_dir"])
    _limit(request["memory_bytes"], request["cpu_seconds"])
    document: Document | None = registry.first("load_document", path=request["path"], mime=request["mime"])
    if document is None:
        raise DocumentError(f"no loaded plugin reads {request['mime']} files; give a PDF or text, or install a loader")
    if len(document.pages) > request["max_pages"]:
        raise DocumentError(f"has {len(document.pages)} pages, at most {request['max_pages']} are read; split it")
    if document.num_chars > request["max_chars"]:
        raise DocumentError(f"has {document.num_chars} characters, at most {request['max_chars']} are read; split it")
    if not document.num_chars:
        raise DocumentError("has no text; choose another file")
    return document


def _encode(document: Document) -> dict[str, Any]:
    return {"pages": [[page.label, page.text] for page in document.pages]}


def _claim_stdout() -> BinaryIO:
    """Keep the real stdout for the answer; redirect all other printing to stderr."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return output


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit what this process uses from now on. Where a platform cannot, the parent's time-out still holds."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in (
        (resource.RLIMIT_AS, _address_space() + memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            continue


def _address_space() -> int:
    """Bytes of address space that this process has mapped already; plugins may have loaded large libraries."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
