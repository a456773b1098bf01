"""Saved prefixes that are damaged, of another model, half written or gone: computed again and reported, never a wrong answer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pitlane import BuildContext, Engine, LinearPart, LinearPlan, Plugin, SamplingParams, Segment, Tensors, hookimpl
from pitlane.engine.models import presets
from pitlane.engine.models.config import RopeConfig
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.text.tokenizer import Prompt, Tokenizer
from pitlane.plugins.prefix_cache.chain import Chain
from pitlane.storage import blobs
from pitlane.storage.db import Store

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LENGTH = 150


def tokens(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


def ask(engine: Any, seed: int = 1, length: int = LENGTH) -> Any:
    """A question on a document."""
    document = Segment(0, length, f"{seed:064x}", f"report {seed}.pdf")
    return engine.generate(Prompt(tokens(seed, length) + tokens(2, 12), (document,), ""), PARAMS)


def opened(engine: Any) -> Any:
    """The engine after its store has opened: opening cleans up, so damage must come later to be met."""
    engine.lane_of(engine.default_plan).state["prefix_cache"].disk._opening.result()
    return engine


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with Engine("random:tiny", dtype="float64", plugins={}) as engine:
        token_ids: list[int] = ask(engine).token_ids
        return token_ids


@pytest.fixture
def saved(make_engine: Callable[..., Any], own_home: Path, expected: list[int]) -> Path:
    """The file of one saved document."""
    engine = make_engine(plugins=["prefix_cache"])
    assert ask(engine).token_ids == expected
    engine.close()
    (file,) = own_home.rglob("prefixes/*.safetensors")
    return file


def flip(place: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(place * (len(data) - 1))] ^= 0x10
        file.write_bytes(data)

    return damage


def flip_at(offset: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[offset] ^= 1
        file.write_bytes(data)

    return damage


def truncate(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(share * file.stat().st_size))


def swap_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-64:-32], data[-32:] = data[-32:], data[-64:-32]
    file.write_bytes(data)


def lie_about_the_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:8] = struct.pack("<Q", 2**62)
    file.write_bytes(data)


def sql(statement: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with Store() as store, store.transaction() as db:
            db.execute(statement)

    return damage


def half_written(file: Path) -> None:
    """Zeros in the second half, as after a power cut on a file system that extends files before it writes them."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


DAMAGES = {
    "length of the header": flip_at(0),
    "header": flip_at(20),
    "metadata": flip_at(150),
    "first value": flip(0.05),
    "a value": flip(0.5),
    "last value": flip(1.0),
    "values swapped": swap_bytes,
    "header of 4 EB": lie_about_the_header,
    "half": truncate(0.5),
    "one byte short": truncate(0.9999),
    "empty": truncate(0.0),
    "half written": half_written,
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "row: size": sql("UPDATE prefixes SET num_bytes = num_bytes + 1"),
    "row: checksum": sql("UPDATE prefixes SET checksum = '0' || checksum"),
    "row: tokens": sql("UPDATE prefixes SET token_ids = substr(token_ids, 1, 8) || token_ids"),
    "row: other tokens": sql("UPDATE prefixes SET token_ids = zeroblob(length(token_ids))"),
    "row: length": sql("UPDATE prefixes SET num_tokens = num_tokens - 1"),
}


SELDOM = {  # damages beside a damage of the same kind
    "length of the header", "metadata", "first value", "last value", "values swapped", "one byte short", "row: size",
    "row: other tokens",
}  # fmt: skip


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in DAMAGES]
)
def test_a_damaged_prefix_is_computed_again_and_reported(
    make_engine: Any, saved: Path, expected: list[int], damage: str, caplog: Any
) -> None:
    engine = opened(make_engine(plugins=["prefix_cache"]))
    DAMAGES[damage](saved)
    result = ask(engine)
    assert result.token_ids == expected
    notes = result.stats["notes"]["prefix_cache"]
    assert result.stats["cached_tokens"] == notes["disk_tokens"] == 0
    assert len(notes["discarded"]) == 1 and notes["discarded"][0] in caplog.text and "computed again" in caplog.text
    engine.close()
    if damage != "a folder":  # Pitlane never makes a folder there, and leaves it alone
        again = ask(make_engine(plugins=["prefix_cache"]))
        assert again.stats["cached_tokens"] == LENGTH and again.token_ids == expected


def test_a_flip_of_any_byte_is_detected(tmp_path: Path) -> None:
    with Store(tmp_path / "pitlane.db") as store:
        saved = store.prefixes.save("fp", "h", [1, 2], {"group.0": torch.randn(2, 2, 1, 2, 4)})
        file = store.prefixes.folder / saved.file
        whole = file.read_bytes()
        for offset in range(len(whole)):
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ (1 << offset % 8)]) + whole[offset + 1 :])
            with pytest.raises(Exception, match="checksum"):
                store.prefixes.load(saved)
        file.write_bytes(whole)
        store.prefixes.load(saved)


class HalvedLinears(Plugin):
    """Stands for another quantization: other weights give other KV."""

    name, role, exactness = "halved", "linear", "approximate"

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        def build(tensors: list[Tensors]) -> Any:
            weight = torch.cat([member["weight"].to(context.dtype) / 2 for member in tensors])
            return lambda x: x @ weight.T

        size = part.num_values * context.dtype.itemsize
        return LinearPlan(size, size, build) if "mlp" in part.name else None


def other_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    change(monkeypatch, rms_norm_eps=1e-3)
    return {}


def other_rope(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    change(monkeypatch, rope=RopeConfig(50_000.0))
    return {}


def other_tokenizer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Tokenizer, "fingerprint", lambda self: "other")
    return {}


def other_dtype(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"dtype": "float32"}


def other_quantization(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    registry = PluginRegistry.load()
    registry.add(HalvedLinears)
    return {"registry": registry, "plugins": {"halved": {}}}


def change(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny": replace(presets.PRESETS["tiny"], **fields)})


OTHERS = [other_model, other_rope, other_tokenizer, other_dtype, other_quantization]


@pytest.mark.parametrize("relabelled", [False, True], ids=["", "relabelled"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_kv_of_another_kind_is_never_used(
    make_engine: Any, saved: Path, monkeypatch: Any, other: Any, relabelled: bool, caplog: Any
) -> None:
    """Not even if its row is changed to name this model: the file describes itself."""
    options = other(monkeypatch)
    plugins = options.pop("plugins", {})
    plain = ask(make_engine(plugins=plugins, **options)).token_ids
    engine = opened(make_engine(plugins={"prefix_cache": {}, **plugins}, **options))
    if relabelled:
        pool = engine.lane_of(engine.default_plan).pool
        key = Chain(pool, "").prefix_hash(tokens(1, LENGTH), LENGTH)
        sql(f"UPDATE prefixes SET fingerprint = '{pool.fingerprint}', block_hash = '{key}'")(saved)
    result = ask(engine)
    assert result.token_ids == plain
    assert result.stats["cached_tokens"] == 0
    assert ("computed again" in caplog.text) == relabelled


def test_a_full_disk_costs_the_saving_alone(
    make_engine: Any, own_home: Path, expected: list[int], monkeypatch: Any, caplog: Any
) -> None:
    engine = opened(make_engine(plugins=["prefix_cache"]))
    monkeypatch.setattr(blobs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert ask(engine).token_ids == expected
    engine.close()
    assert "was not saved" in caplog.text and not list(own_home.rglob("prefixes/*"))


@pytest.mark.slow
def test_a_disk_that_fills_up(
    make_engine: Any, tmp_path: Path, expected: list[int], monkeypatch: Any, caplog: Any
) -> None:
    """A real disk of 2 MB, with room for the database and little else. The check of free space is told of more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        monkeypatch.setenv("PITLANE_HOME", str(disk))
        monkeypatch.setattr(blobs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
        engine = make_engine(plugins=["prefix_cache"])
        for seed in range(1, 9):
            answer = ask(engine, seed, 600)  # 1.2 MB each
            assert answer.finish_reason == "length"
        assert ask(engine).token_ids == expected
        engine.close()
        assert "was not saved" in caplog.text and "No space left" in caplog.text
        assert not [path for path in disk.rglob("prefixes/*") if blobs.temporary(path)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SERVER = """
import os, random, signal, sys, time
import torch
from pitlane import Engine, SamplingParams, Segment
from pitlane.engine.text.tokenizer import Prompt
from pitlane.storage.db import Store

torch.set_num_threads(1)

def tokens(seed, length):
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]

def ask(engine, seed, length):
    prompt = Prompt(tokens(seed, length) + tokens(2, 12), (Segment(0, length, f"{seed:064x}", f"report {seed}.pdf"),), "")
    return engine.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True))

def save_for_ever(number):
    sync = os.fsync
    os.fsync = lambda file: (time.sleep(0.02), sync(file))  # so that a kill comes in the middle of a save
    engine = Engine("random:tiny", dtype="float64", plugins={"prefix_cache": {}})
    print("ready", os.getpid(), flush=True)
    while True:
        for seed in (1, 2):
            ask(engine, seed, 150)
        cache = engine.lane_of(engine.default_plan).state["prefix_cache"]
        cache.disk._opening.result().prefixes.prune(0)
        engine.worker.call(lambda: cache.evict([10**6])).result()

def ask_often(number):
    for _ in range(number):
        with Engine("random:tiny", dtype="float64", plugins={"prefix_cache": {}}) as engine:
            for seed in (1, 2):
                result = ask(engine, seed, 150)
                line = " ".join(map(str, (seed, result.stats["cached_tokens"], *result.token_ids)))
                os.write(1, (line + os.linesep).encode())  # whole lines: two processes write here
        if random.random() < 0.3:
            with Store() as store:
                store.prefixes.prune(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("loaded", flush=True)
for line in sys.stdin:
    command, number = line.split()
    if os.fork() == 0:
        random.seed()
        globals()[command](int(number))
        os._exit(0)
"""


@pytest.fixture
def server(own_home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and forks on command, so that a start takes milliseconds."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def tell(server: subprocess.Popen[str], command: str) -> None:
    assert server.stdin is not None
    server.stdin.write(command + "\n")
    server.stdin.flush()


def hear(server: subprocess.Popen[str]) -> list[str]:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, "a process died"
    return line.split()


def answers_of(lines: list[list[str]]) -> set[tuple[str, ...]]:
    return {(seed, *token_ids) for seed, _, *token_ids in lines}


def test_two_processes_save_and_load_the_same_documents_at_once(server: Any, expected: list[int]) -> None:
    """They also remove the documents now and then."""
    rounds = 10
    for _ in range(2):
        tell(server, f"ask_often {rounds}")
    lines = [hear(server) for _ in range(2 * 2 * rounds)]
    answers = answers_of(lines)
    assert len(answers) == 2 and ("1", *map(str, expected)) in answers
    cached = [int(count) for _, count, *_ in lines]
    assert 0 in cached and max(cached) == LENGTH


def has_half_a_file(folder: Path) -> bool:
    return any(blobs.temporary(path) for path in folder.rglob("prefixes/*"))


def pause_in_a_save(pid: int, folder: Path, chance: random.Random) -> None:
    """Stop a process that saves for ever while one of its files is incomplete."""
    for _ in range(2000):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.002)  # the signal takes effect
        if has_half_a_file(folder):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(chance.uniform(0.0, 0.01))
    raise AssertionError("the process never saves")


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_save(
    server: Any, make_engine: Any, own_home: Path, expected: list[int], num_kills: int
) -> None:
    chance, num_whole, num_left = random.Random(num_kills), 0, 0
    for index in range(num_kills):
        tell(server, "save_for_ever 0")
        ready, pid = hear(server)
        time.sleep(chance.uniform(0.05, 0.4))
        if index % 5 == 0:  # at least these kills meet an incomplete file
            pause_in_a_save(int(pid), own_home, chance)
        os.kill(int(pid), signal.SIGKILL)
        num_left += has_half_a_file(own_home)
        with Store() as store:
            rows = store.prefixes.list()
            for row in rows:
                store.prefixes.load(row)  # raises if the file does not match its row
            files = {path.name for path in store.prefixes.folder.iterdir() if not blobs.temporary(path)}
            assert files == {row.file for row in rows}
        engine = make_engine(plugins=["prefix_cache"])
        result = ask(engine)
        engine.close()
        assert result.token_ids == expected
        assert result.stats["notes"]["prefix_cache"]["discarded"] == []
        num_whole += result.stats["cached_tokens"] == LENGTH
        shutil.rmtree(own_home / "prefixes")
    assert num_left > 0, "no kill came in the middle of a save"
    print(f"{num_kills} kills, {num_left} in the middle of a save, {num_whole} documents whole")
