"""What reaches a terminal: names with control characters, other encodings, streams that are closed or full, colours."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pitlane.storage.db import Store
from pitlane.storage.types import whole_text
from pitlane.ui import render
from pitlane.ui.cli import main

PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]
TINY = ("-m", "random:tiny")
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TRICKS = ["\x1b[31mred", "\x07bell", "\x9b2J", "up\u202eside", "a\u2066b", "two\nlines", "[/red]", "[bold]"]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def start(*args: str | bytes, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run in a process of its own; a locale of the caller does not count."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return subprocess.run([*PITLANE, *args], capture_output=True, check=False, env=plain | {"LC_ALL": "C.UTF-8"} | env)


# ---- names


def test_no_name_of_a_document_is_obeyed_by_a_terminal(tmp_path: Path) -> None:
    for trick in TRICKS:
        (tmp_path / f"{trick.replace('/', '')}.txt").write_text(f"{trick!r} " * 20)
    found = [invoke("docs", "add", "--no-prefill", *map(str, tmp_path.glob("*.txt"))), invoke("docs", "list")]
    with Store() as store:
        found += [invoke("docs", "rm", document.id) for document in store.documents.list()]
    assert [result.exit_code for result in found] == [0] * (2 + len(TRICKS))
    found += [invoke("docs", "rm", "\x1b[31mred"), invoke("run", "-m", "./\x1b[31mred", "x"), invoke("\x1b[31mred")]
    for result in found:
        assert all(char.isprintable() or char == "\n" for char in result.output), ascii(result.output)


def test_no_title_of_a_conversation_is_obeyed_by_a_terminal() -> None:
    lines = "hello\n/save \x1b[31mred\n/load\n/search red\n/load \x1b[2J\n/exit\n"
    result = CliRunner().invoke(main, ["chat", *TINY, "--max-tokens", "1"], input=lines)
    assert result.exit_code == 0 and "\ufffd[31mred" in result.stderr and "\x1b" not in result.stderr


def test_a_table_on_a_narrow_terminal_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys, "stdout", terminal)
    render.print_table(list("VWXYZ"), [["abcdefghijklmnop", "q", "r", "s", "t"]], "[/title]")
    assert set("VWXYZabcdefghijklmnopqrst") <= set(terminal.getvalue())


@pytest.mark.parametrize(("value", "is_plain"), [("1", True), ("", False)])
def test_no_color_is_heeded(value: str, is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr("pitlane.ui.render.click.echo", lambda text, err: written.append(text))
    render.note("a note")
    assert (written == ["a note"]) == is_plain


# ---- encodings


def test_bytes_that_a_locale_cannot_read_are_letters() -> None:
    for text in ("h\u00e9llo", "\u65e5\u672c", "\U0001f642"):
        assert whole_text(text.encode().decode("ascii", "surrogateescape")) == text
    assert (
        whole_text("a\udcffb") == "a\ufffdb"
        and whole_text("\ud800") == "?"
        and whole_text("plain \u00e9") == "plain \u00e9"
    )


def test_a_prompt_means_the_same_under_a_c_locale() -> None:
    command = (
        "run",
        *TINY,
        "--raw",
        "--json",
        "--max-tokens",
        "4",
        "--plugins",
        "",
        "--stop",
        "\u00e9",
        "h\u00e9llo \u65e5\u672c",
    )
    expected = json.loads(invoke(*command).stdout)
    found = json.loads(start(*(part.encode() for part in command), **C_LOCALE).stdout)
    assert found["token_ids"] == expected["token_ids"]
    assert found["stats"]["prompt_tokens"] == expected["stats"]["prompt_tokens"]


def test_a_file_whose_name_is_no_text_is_added_and_found(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(name, "wb") as file:
        file.write(b"Some text. " * 20)
    added = start("docs", "add", "--no-prefill", name)
    assert added.returncode == 0 and "caf\ufffd.txt".encode() in added.stdout
    assert start("docs", "rm", b"caf\xe9.txt", **C_LOCALE).returncode == 0


@pytest.mark.parametrize("encoding", ["latin-1", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_letters_that_the_output_lacks_are_replaced(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "\u65e5\u672c.txt"
    file.write_text("Some text. " * 20)
    result = start("docs", "add", "--no-prefill", str(file), PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and b"??.txt: 1 pages" in result.stdout and result.stderr == b""


def test_lines_of_chat_that_are_no_utf8_are_taken() -> None:
    result = CliRunner().invoke(main, ["chat", *TINY, "--max-tokens", "1"], input=b"caf\xe9\n/exit\n")
    assert result.exit_code == 0 and "TTFT" in result.stderr


# ---- streams


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@FULL
@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("docs", "list", "--json"),
        pytest.param(("plugins", "list"), marks=pytest.mark.slow),
        pytest.param(("run", *TINY, "--max-tokens", "2", "x"), marks=pytest.mark.slow),
    ],
)
def test_a_full_device_is_one_line(args: Sequence[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*PITLANE, *args], stdout=full, stderr=subprocess.PIPE, check=False)
    (line,) = result.stderr.decode().splitlines()
    assert result.returncode == 2 and line.startswith("pitlane: cannot write the output: No space left on device")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("end", ["| true", ">&-", "<&-"])
def test_a_closed_stream_is_quiet(end: str) -> None:
    command = " ".join(f"'{part}'" if part != PITLANE[2] else f'"{part}"' for part in PITLANE)
    result = subprocess.run(f"{command} docs cache ls --json {end}", shell=True, capture_output=True, check=False)
    assert result.stderr == b""
