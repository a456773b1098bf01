"""The folder of a decoded GGUF file: made once, whole or not at all, and made again when it is damaged or the file changes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf import folder as module
from pitlane.engine.models.gguf import stream
from pitlane.engine.models.gguf.folder import open_gguf
from tests.engine.models.gguf.model_files import convert
from tests.engine.models.test_architectures import make

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make("Llama", TINY, tmp_path / "source")
    return convert(tmp_path / "source", tmp_path / "tiny.gguf")


@pytest.fixture
def cache(own_home: Path) -> Path:
    return own_home / "cache" / "gguf"


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weight files written so far."""
    targets: list[Path] = []

    def write(jobs: Any, dtype: str, target: Path, progress: Any) -> None:
        targets.append(target)
        stream.write(jobs, dtype, target, progress)

    monkeypatch.setattr(module, "write", write)
    return targets


def test_made_once(file: Path, cache: Path, decodings: list[Path]) -> None:
    folder = open_gguf(file)
    assert folder.parent == cache and list(cache.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "gguf.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert json.loads((folder / "gguf.json").read_text())["files"] == [str(file)]
    assert open_gguf(file) == folder
    assert len(decodings) == 1


def test_a_moved_file_keeps_its_folder(file: Path, decodings: list[Path]) -> None:
    folder = open_gguf(file)
    assert open_gguf(file.rename(file.with_name("other.gguf"))) == folder
    assert len(decodings) == 1


def test_a_changed_file_makes_a_new_folder(file: Path, cache: Path, decodings: list[Path]) -> None:
    first = open_gguf(file)
    raw, times = bytearray(file.read_bytes()), os.stat(file)
    raw[-40] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = open_gguf(file)
    assert second != first and len(decodings) == 2
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert set(cache.iterdir()) == {first, second}


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "short weights": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no record": lambda folder: (folder / "gguf.json").unlink(),
    "empty record": lambda folder: (folder / "gguf.json").write_text(""),
    "wrong record": lambda folder: (folder / "gguf.json").write_text('{"sizes": [3]}'),
    "no files": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again(damage: str, file: Path, cache: Path, decodings: list[Path]) -> None:
    folder = open_gguf(file)
    whole = (folder / "model.safetensors").read_bytes()
    DAMAGES[damage](folder)
    assert open_gguf(file) == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(decodings) == 2 and list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_nothing_half_stays(error: BaseException, file: Path, cache: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelError
    with pytest.raises(expected) as caught:
        open_gguf(file, progress)
    assert list(cache.iterdir()) == []
    if expected is ModelError:
        assert f"{file} cannot be decoded into {cache}: No space left on device: the disk is full" in str(caught.value)
    assert open_gguf(file).is_dir()


def test_a_tokenizer_that_is_not_supported(
    file: Path, cache: Path, tokenizer_module: Any, decodings: list[Path]
) -> None:
    def refuse(metadata: Any, folder: Path) -> None:
        assert metadata["tokenizer.ggml.model"] == "gpt2"
        raise ModelError("tokenizer 'x' is not supported; choose another file")

    tokenizer_module.write_tokenizer = refuse
    with pytest.raises(ModelError, match=f"^{re.escape(str(file))}: tokenizer 'x' is not supported"):
        open_gguf(file)
    assert list(cache.iterdir()) == decodings == []


def test_full_disk_is_seen_before_the_work(
    file: Path, cache: Path, decodings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(ModelError, match=r"needs 0 MB in .*, 0 MB are free; free some space, or set PITLANE_HOME"):
        open_gguf(file)
    assert list(cache.iterdir()) == decodings == []


def test_a_file_that_changes_meanwhile(file: Path, cache: Path) -> None:
    def progress(done: int, total: int) -> None:
        os.utime(file, (1, 1))

    with pytest.raises(ModelError, match="changed while it was decoded; open it again"):
        open_gguf(file, progress)
    assert list(cache.iterdir()) == []


def test_progress(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, int]] = []
    open_gguf(file, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and len(calls) > 1
    assert calls[-1][0] == calls[-1][1] > 0
    assert not caplog.messages


def test_log_line(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        open_gguf(file)
    assert caplog.messages == ["decoding tiny.gguf, 0 MB, once"]


def test_two_at_once(file: Path, cache: Path) -> None:
    """All write a folder of their own; one becomes the model's folder, the others go."""
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: open_gguf(file), range(4)))
    assert list(cache.iterdir()) == list(folders)
    assert module._is_complete(*folders)


def test_values_that_are_not_finite(file: Path, cache: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-8:] = b"\xff" * 8
    file.write_bytes(raw)
    with pytest.raises(ModelError, match=r"tensor .* holds values that are not finite; download it again"):
        open_gguf(file)
    assert list(cache.iterdir()) == []


def test_a_refused_file_is_not_hashed(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hashes", lambda states: pytest.fail("hashed"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="truncated"):
        open_gguf(tmp_path / "bad.gguf")
    assert not (own_home / "cache").exists()


def test_remains_of_killed_processes_go(file: Path, cache: Path) -> None:
    old, young = cache / f"{module.TEMPORARY}1", cache / f"{module.TEMPORARY}2"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x")
    past = time.time() - 2 * module.STALE_SECONDS
    os.utime(old, (past, past))
    os.utime(old / "model.safetensors", (past, past))
    folder = open_gguf(file)
    assert set(cache.iterdir()) == {young, folder}


CHILD = """
import sys
from types import ModuleType
from pathlib import Path
sys.modules["pitlane.engine.text.gguf_tokenizer"] = ModuleType("stub")
sys.modules["pitlane.engine.text.gguf_tokenizer"].write_tokenizer = lambda metadata, folder: None
from pitlane.engine.models.gguf.folder import open_gguf
import time
def progress(done, total):
    print("decoding", flush=True)
    time.sleep(60)
open_gguf(Path(sys.argv[1]), progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_in_a_process(file: Path, cache: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"decoding\n"
        assert [path.name.startswith(module.TEMPORARY) for path in cache.iterdir()] == [True]
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error
    assert list(cache.iterdir()) == []
