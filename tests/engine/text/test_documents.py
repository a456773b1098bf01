"""Reading documents: checks, the child process and its limits, and one line for every failure."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pitlane.engine.text.documents import DocumentLimits, load_document, sniff, unreadable_letters
from pitlane.storage.errors import DocumentError

SIMPLE_PDF = b"""%PDF-1.4
1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj
2 0 obj << /Type /Pages /Kids [4 0 R] /Count 1 /MediaBox [0 0 300 300] >> endobj
3 0 obj << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> endobj
4 0 obj << /Type /Page /Parent 2 0 R /Resources << /Font << /F 3 0 R >> >> /Contents 5 0 R >> endobj
5 0 obj << /Length 40 >> stream
BT /F 12 Tf 50 200 Td (Hello lane) Tj ET
endstream endobj
trailer << /Root 1 0 R >>
%%EOF
"""
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits")


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def loader(folder: Path, body: str) -> Path:
    """A folder with a plugin file that reads application/zip by running `body`."""
    plugins = folder / "plugins"
    plugins.mkdir()
    indented = "\n".join("        " + line for line in body.splitlines())
    (plugins / "trial_loader.py").write_text(
        '"""Trial loader: for tests.\n\nChanges in the loop: none.\nExactness: identical. Costs: nothing.\n"""\n'
        "import os, sys, time\n"
        "from pitlane import Document, DocumentError, Page, Plugin, hookimpl\n"
        "class TrialLoader(Plugin):\n"
        '    name, exactness = "trial_loader", "identical"\n'
        "    @hookimpl\n"
        "    def load_document(self, path, mime):\n"
        "        if mime != 'application/zip': return None\n" + indented + "\n"
    )
    return plugins


def refused(path: Path, **options: object) -> str:
    with pytest.raises(DocumentError) as caught:
        load_document(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message.startswith(f"{path.name}: ")
    return message


def test_pdf_and_text_come_back(tmp_path: Path) -> None:
    pdf = load_document(write(tmp_path, "a.pdf", SIMPLE_PDF), title="My  report")
    assert (pdf.title, pdf.mime, pdf.content_hash) == (
        "My report",
        "application/pdf",
        hashlib.sha256(SIMPLE_PDF).hexdigest(),
    )
    assert pdf.text == '<document title="My report">\n[p. 1]\nHello lane\n</document>'
    text = load_document(str(write(tmp_path, "b.md", "# Ünï\n\n中文 🏎".encode())))
    assert (text.title, text.mime, text.pages[0].text) == ("b.md", "text/plain", "# Ünï\n\n中文 🏎")
    assert load_document(write(tmp_path, "no ending", SIMPLE_PDF)).mime == "application/pdf"


@pytest.mark.parametrize(
    ("head", "mime"),
    [
        (b"%PDF-1.7\n", "application/pdf"),
        (b"\n\njunk\n%PDF-1.4\n\xff\x00", "application/pdf"),
        (b"an article that mentions %PDF-1.4 in a line", "text/plain"),
        (b" " * 2000 + b"\n%PDF-1.4\n", "text/plain"),
        (b"plain", "text/plain"),
        ("naïve".encode("latin-1"), "text/plain"),
        ("naïve".encode("utf-16"), "text/plain"),
        (b"a\0b", "application/octet-stream"),
        ("naïve text".encode("utf-16-le"), "text/plain"),
        ("naïve text".encode("utf-16-be"), "text/plain"),
        (b"a line of a log\n" * 100 + b"\0" + b"the next line\n" * 100, "text/plain"),
        (b"a" * 200 + b"\0" * 4, "application/octet-stream"),
        (b"\0" * 1000, "application/octet-stream"),
        (bytes(range(1, 32)) * 10, "application/octet-stream"),
        (b"PK\x03\x04rest", "application/zip"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
    ],
)
def test_types_are_told_by_content(head: bytes, mime: str) -> None:
    assert sniff(head) == mime


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.pdf")
    assert "is a folder" in refused(tmp_path)
    assert "is empty (0 bytes)" in refused(write(tmp_path, "empty.pdf", b""))
    assert "at most 0.0 MB" in refused(write(tmp_path, "big.txt", b"x" * 999), limits=DocumentLimits(file_bytes=100))
    assert "no loaded plugin reads image/png" in refused(write(tmp_path, "a.png", b"\x89PNG\r\n\x1a\n"))


def test_letters_that_could_not_be_read_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_document(write(tmp_path, "good.txt", "Grüße".encode()))
    assert not caplog.messages
    document = load_document(write(tmp_path, "bad.pdf", SIMPLE_PDF.replace(b"Hello lane", rb"x\001y \002z")))
    warning = unreadable_letters(document)
    assert warning and warning.startswith("unreadable letters: 2, on pages 1; the text shows \ufffd instead; save")
    assert caplog.messages == [f"bad.pdf: {warning}"]


@POSIX
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pdf")
    assert "not a regular file" in refused(tmp_path / "pipe.pdf")


def test_mislabelled_files_name_both_types(tmp_path: Path) -> None:
    assert "named .pdf, but its content is text/plain" in refused(write(tmp_path, "a.pdf", b"just text"))
    message = refused(write(tmp_path, "b.txt", SIMPLE_PDF))
    assert "named .txt, but its content is application/pdf; rename it to b.pdf" in message


def test_a_plugins_refusal_and_failure_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.zip", b"PK\x03\x04")
    plugins = loader(tmp_path, "raise DocumentError('holds\\nno text; try another')")
    assert refused(path, plugins_dir=plugins) == "a.zip: holds no text; try another"
    shutil.rmtree(plugins)
    plugins = loader(tmp_path, "return 1 / 0")
    assert "ZeroDivisionError" in refused(path, plugins_dir=plugins)


def test_a_plugin_may_print_and_labels_come_back(tmp_path: Path) -> None:
    body = "print('noise'); os.write(1, b'noise')\nreturn Document('t', mime, (Page(0, 'iv', 'x\\ud800'),), '')"
    document = load_document(write(tmp_path, "a.zip", b"PK\x03\x04"), plugins_dir=loader(tmp_path, body))
    assert [(page.label, page.text) for page in document.pages] == [("iv", "x?")]


@POSIX
def test_a_loader_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    body = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open(path + '.pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    path = write(tmp_path, "a.zip", b"PK\x03\x04")
    start = time.monotonic()
    message = refused(path, plugins_dir=loader(tmp_path, body), limits=DocumentLimits(seconds=1.5))
    assert "not read within 1.5 s" in message and time.monotonic() - start < 5
    pid = int((tmp_path / "a.zip.pid").read_text())
    for _ in range(100):
        status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not status.strip() or status.startswith("Z"):
            return
        time.sleep(0.02)
    pytest.fail(f"the loader's child {pid} is still there")


@POSIX
def test_a_loader_that_crashes_is_named(tmp_path: Path) -> None:
    plugins = loader(tmp_path, f"os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    assert "SIGSEGV" in refused(write(tmp_path, "a.zip", b"PK\x03\x04"), plugins_dir=plugins)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_a_loader_that_eats_memory_is_stopped(tmp_path: Path) -> None:
    plugins = loader(tmp_path, "return bytearray(1 << 30)")
    limits = DocumentLimits(memory_bytes=256 << 20)
    message = refused(write(tmp_path, "a.zip", b"PK\x03\x04"), plugins_dir=plugins, limits=limits)
    assert "needs more than 0.2 GiB of memory" in message


def test_caps_on_pages_and_characters(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"word " * 3000)
    assert "has 5 pages, at most 2" in refused(path, limits=DocumentLimits(pages=2))
    assert "characters, at most 100" in refused(path, limits=DocumentLimits(chars=100))


def test_the_child_starts_without_torch(tmp_path: Path) -> None:
    body = "return Document('t', mime, (Page(0, '1', str('torch' in sys.modules)),), '')"
    document = load_document(write(tmp_path, "a.zip", b"PK\x03\x04"), plugins_dir=loader(tmp_path, body))
    assert document.pages[0].text == "False"


def test_the_working_folder_brings_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pypdfium2.py").write_text("raise SystemExit('wrong module')")
    monkeypatch.chdir(tmp_path)
    assert load_document(write(tmp_path, "a.pdf", SIMPLE_PDF)).pages[0].text == "Hello lane"


def test_damaged_pdfs_never_harm_the_host(tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(5):
        data = bytearray(SIMPLE_PDF)
        for _ in range(40):
            data[chance.randrange(8, len(data))] = chance.randrange(256)
        path = write(tmp_path, f"{number}.pdf", bytes(data[: chance.randrange(100, len(data))]))
        try:
            assert load_document(path).num_chars > 0
        except DocumentError as error:
            assert str(error).startswith(path.name) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pdfplumber__empty.pdf", "is empty"),
        ("pdfplumber__password-example.pdf", "is encrypted"),
        ("pypdf__r6-user-password.pdf", "is encrypted"),
        ("pypdf__imagemagick-CCITTFaxDecode.pdf", "has no text (1 of 1 pages are images); run OCR"),
        ("pdfjs__poppler-742-0-fuzzed.pdf", "damaged"),
        ("pdfjs__poppler-937-0-fuzzed.pdf", "damaged"),
        ("pdfjs__operator_list_cycle.pdf", "has no text"),
    ],
)
def test_real_files_that_cannot_be_read(shared_data: Path, name: str, says: str) -> None:
    assert says in refused(shared_data / "pdfs" / name)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("pdfjs__bomb_giant.pdf", "GIANT JBIG2 BOMB"),
        ("pdfjs__Pages-tree-refs.pdf", "Pages loop"),
        ("pdfminer__zen_of_python_corrupted.pdf", "Beautiful is better than ugly."),
        ("pypdf__multilang.pdf", "مرحبا بالعالم"),
        ("pdfminer__i1040nr.pdf", "[p. 50]"),
    ],
)
def test_real_files_that_can(shared_data: Path, name: str, phrase: str) -> None:
    assert phrase in load_document(shared_data / "pdfs" / name).text
