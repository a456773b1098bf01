"""Read a file into a document: check the file, find its type from its content, let a child process read it.

PDF readers are large C libraries, and the files come from strangers. So they run in a child process
(`document_worker.py`) with limits of memory, processor time and wall time. Any failure there becomes a DocumentError
that begins with the file's name. Knows no file format: loaders are plugins on the `load_document` hook.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitlane.storage.errors import DocumentError
from pitlane.storage.types import MAX_CHARS, MAX_PAGES, Document, Page, utf16_without_mark

log = logging.getLogger("pitlane")
_SNIFF_BYTES = 65_536
_PDF_HEADER = re.compile(rb"^%PDF-\d", re.MULTILINE)
_MAGIC = (
    (b"PK\x03\x04", "application/zip"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"\x1f\x8b", "application/gzip"),
    (b"\xd0\xcf\x11\xe0", "application/x-ole-storage"),
)
_TEXT_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".markdown", ".rst", ".csv", ".log"})
_DAMAGE = "which a damaged file may cause; split it or save it anew"
_BLANKS = frozenset(b"\t\n\r\f\b\x1b")


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """Limits on a file: its size, the resources to read it, and the size of its text."""

    file_bytes: int = 200 * 10**6
    seconds: float = 60.0
    memory_bytes: int = 2 << 30
    pages: int = MAX_PAGES
    chars: int = MAX_CHARS


def load_document(
    path: str | Path,
    *,
    title: str | None = None,
    plugins_dir: str | Path | None = None,
    limits: DocumentLimits | None = None,
) -> Document:
    """Read a file into pages of text; `title` defaults to its name. Raises DocumentError with one line for people."""
    limits = limits or DocumentLimits()
    path = Path(path).expanduser().absolute()
    name = " ".join((title or path.name).split())
    try:
        content_hash, head = _inspect(path, limits)
        mime = sniff(head)
        _check_name(path, mime)
        answer = _read_in_child(
            {
                "path": str(path),
                "mime": mime,
                "plugins_dir": str(plugins_dir) if plugins_dir else None,
                "max_pages": limits.pages,
                "max_chars": limits.chars,
                "memory_bytes": limits.memory_bytes,
                "cpu_seconds": int(limits.seconds) + 1,
            },
            limits,
        )
        pages = tuple(Page(index, str(label), str(text)) for index, (label, text) in enumerate(answer["pages"]))
    except DocumentError as error:
        raise DocumentError(f"{name}: {_one_line(str(error))}") from None
    document = Document(name, mime, pages, content_hash)
    if warning := unreadable_letters(document):
        log.warning("%s: %s", name, warning)
    return document


def unreadable_letters(document: Document) -> str | None:
    """A warning for people if the document's text contains U+FFFD for letters that could not be read; else None."""
    counts = {page.index + 1: page.text.count("\ufffd") for page in document.pages if "\ufffd" in page.text}
    if not counts:
        return None
    pages = ", ".join(map(str, list(counts)[:5])) + (", …" if len(counts) > 5 else "")
    return (
        f"letters that cannot be read: {sum(counts.values())}, on pages {pages}; they appear as \ufffd in the text; "
        "save the file anew so that its text can be copied, or run OCR on it, and add it again"
    )


def sniff(head: bytes) -> str:
    """Return the MIME type from a file's first bytes (64 KiB are enough). Its name does not count."""
    if head.startswith(b"%PDF-") or _PDF_HEADER.search(head[:1024]):
        return "application/pdf"
    for magic, mime in _MAGIC:
        if head.startswith(magic):
            return mime
    if head.startswith(_TEXT_MARKS):
        return "text/plain"
    if utf16_without_mark(head):
        return "text/plain"
    num_odd = sum(byte < 32 and byte not in _BLANKS for byte in head)
    is_text = head.count(0) * 1000 <= len(head) and num_odd * 50 <= len(head)  # a damaged log may contain some zeros
    return "text/plain" if is_text else "application/octet-stream"


def _inspect(path: Path, limits: DocumentLimits) -> tuple[str, bytes]:
    """Check that the file can be read; return its SHA-256 and its first bytes."""
    try:
        if path.is_dir():
            raise DocumentError("is a folder; give the files in it one by one")
        if path.exists() and not path.is_file():
            raise DocumentError("is not a regular file; copy its content to a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DocumentError("is empty (0 bytes); get the file anew")
            if size > limits.file_bytes:
                mb, allowed = size / 1e6, limits.file_bytes / 1e6
                raise DocumentError(f"has {mb:.1f} MB, at most {allowed:.1f} MB are read; split it")
            head = file.read(_SNIFF_BYTES)
            digest = hashlib.sha256(head)
            while piece := file.read(1 << 20):
                digest.update(piece)
    except FileNotFoundError:
        raise DocumentError(f"there is no such file ({path}); check the path") from None
    except OSError as error:
        raise DocumentError(f"cannot be opened ({error.strerror}); check the path and its permissions") from None
    return digest.hexdigest(), head


def _check_name(path: Path, mime: str) -> None:
    suffix = path.suffix.lower()
    if suffix == ".pdf" and mime != "application/pdf":
        raise DocumentError(f"is named {suffix}, but its content is {mime}, not a PDF; rename it or get it anew")
    if suffix in _TEXT_SUFFIXES and mime == "application/pdf":
        raise DocumentError(f"is named {suffix}, but its content is {mime}; rename it to {path.stem}.pdf")


def _read_in_child(request: dict[str, Any], limits: DocumentLimits) -> dict[str, Any]:
    """Run the worker on one request and return its document. Raises DocumentError with its message or its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pitlane.engine.text.document_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # do not import modules from the working folder
        start_new_session=True,
    )
    output, timed_out = _exchange(process, json.dumps(request).encode(), limits)
    if timed_out:
        raise DocumentError(f"was not read within {limits.seconds:g} s, {_DAMAGE}")
    try:
        answer = json.loads(output)
    except ValueError:
        raise DocumentError(_how_it_ended(process.returncode, limits)) from None
    if "document" not in answer:
        raise DocumentError(answer.get("error") or "cannot be read")
    document: dict[str, Any] = answer["document"]
    return document


def _exchange(process: subprocess.Popen[bytes], request: bytes, limits: DocumentLimits) -> tuple[bytes, bool]:
    """Send the request, read the answer up to the limits, and end all processes of the child's group.

    Returns the answer and whether the time ran out.
    """
    assert process.stdin and process.stdout, "the worker is started with pipes"
    stdin, stdout = process.stdin, process.stdout
    output: list[bytes] = []
    # UTF-8 takes up to four bytes per character, an escape such as \n takes two. A page also has a label.
    max_bytes = 4 * limits.chars + 200 * limits.pages + 65_536

    def talk() -> None:
        with suppress(OSError):  # the child died before it read the request; its exit status says why
            stdin.write(request)
            stdin.close()
        output.append(stdout.read(max_bytes))

    reader = threading.Thread(target=talk, name="document-reader", daemon=True)
    reader.start()
    try:
        reader.join(limits.seconds)
        timed_out = reader.is_alive()
    finally:
        _end(process)
    reader.join()
    stdout.close()
    return b"".join(output), timed_out


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker and its children. Before `wait` the system gives its process id to no other process."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal an ended process
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _how_it_ended(returncode: int, limits: DocumentLimits) -> str:
    if os.name == "posix" and returncode == -signal.SIGXCPU:
        return f"took more than {limits.seconds:g} s of processor time, {_DAMAGE}"
    how = signal.Signals(-returncode).name if returncode < 0 else f"code {returncode}"
    memory = f"{limits.memory_bytes / (1 << 30):.1f} GiB"
    return f"made its reader stop ({how}): it is damaged or needs more than {memory} of memory; save it anew"


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 500 else line[:499] + "…"
