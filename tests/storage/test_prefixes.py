"""Saved prefixes: save and load, find, quota, damage, two processes at once, a process killed in the middle of a save."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pitlane.storage import blobs
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, PrefixMismatch, StorageError
from pitlane.storage.types import Document, Page, SavedPrefix

KV_BYTES = 2 * 2 * 3 * 32 * 8 * 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "pitlane.db") as opened:
        yield opened


def kv(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 2, 3, 32, 8, generator=generator).to(dtype)
    return {"group0.keys": values[0], "group0.values": values[1]}  # two views of one storage, as a KV store exports


def save(store: Store, block_hash: str = "h1", num_tokens: int = 32, seed: int = 0) -> SavedPrefix:
    return store.prefixes.save("fp", block_hash, range(num_tokens), kv(seed))


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.prefixes.folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_round_trip_to_the_bit(store: Store, dtype: torch.dtype) -> None:
    tensors = kv(dtype=dtype)
    saved = store.prefixes.save("fp", "h1", [5, 2**31, 7], tensors, title="report.pdf", document_hash="d" * 64)
    loaded = store.prefixes.load(saved)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)
    assert store.prefixes.token_ids(saved) == [5, 2**31, 7]
    assert (saved.num_tokens, saved.title, saved.document_hash, saved.pinned) == (3, "report.pdf", "d" * 64, False)
    assert files(store) == [saved.file]


def test_strided_tensors_are_saved_as_they_look(store: Store) -> None:
    tensor = torch.arange(24.0).reshape(4, 6).t()
    saved = store.prefixes.save("fp", "h", [1], {"a": tensor, "b": tensor[1:3]})
    loaded = store.prefixes.load(saved)
    assert torch.equal(loaded["a"], tensor) and torch.equal(loaded["b"], tensor[1:3])


def test_saving_again_writes_nothing(store: Store) -> None:
    first = save(store)
    stamp = (store.prefixes.folder / first.file).stat().st_mtime_ns
    assert save(store, seed=1).id == first.id
    assert (store.prefixes.folder / first.file).stat().st_mtime_ns == stamp
    assert len(store.prefixes.list()) == 1


def test_saving_again_repairs_a_lost_file(store: Store) -> None:
    first = save(store)
    (store.prefixes.folder / first.file).unlink()
    again = save(store)
    assert torch.equal(store.prefixes.load(again)["group0.keys"], kv()["group0.keys"])
    assert len(store.prefixes.list()) == 1


def test_find_returns_those_of_the_same_fingerprint_longest_first(store: Store) -> None:
    save(store, "short", 32)
    save(store, "long", 64)
    save(store, "other branch", 96)
    store.prefixes.save("another model", "long", range(64), kv())
    hashes = ["short", "long", "x"]
    prefixes = store.prefixes.find("fp", hashes)
    assert [(prefix.block_hash, prefix.fingerprint) for prefix in prefixes] == [("long", "fp"), ("short", "fp")]
    assert store.prefixes.find("fp", ["nothing"]) == store.prefixes.find("fp", []) == []
    assert store.prefixes.find("unknown", hashes) == []


def test_find_is_quick(store: Store) -> None:
    for number in range(40):
        save(store, f"h{number}", number + 1)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        assert len(store.prefixes.find("fp", [f"x{number}" for number in range(10)] + ["h3"])) == 1
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_prune_removes_the_least_recently_used_and_never_the_pinned(store: Store) -> None:
    saved = [save(store, f"h{number}", number + 1) for number in range(4)]
    size = saved[0].num_bytes
    store.prefixes.pin(saved[1].id)
    store.prefixes.find("fp", ["h0"])
    removed = store.prefixes.prune(2 * size)
    assert [prefix.block_hash for prefix in removed] == ["h2", "h3"]
    assert {prefix.block_hash for prefix in store.prefixes.list()} == {"h0", "h1"}
    assert store.prefixes.prune(0)[0].block_hash == "h0"
    assert [prefix.block_hash for prefix in store.prefixes.list()] == ["h1"]
    assert files(store) == [saved[1].file]
    store.prefixes.pin(saved[1].id, False)
    store.prefixes.prune(0)
    assert store.prefixes.total_bytes() == 0 and files(store) == []


def test_save_stays_within_the_quota(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db", quota_bytes=3 * KV_BYTES) as store:
        for number in range(6):
            save(store, f"h{number}")
        assert [prefix.block_hash for prefix in store.prefixes.list()] == ["h5", "h4"]  # a file is larger than its KV
        for prefix in store.prefixes.list():
            store.prefixes.pin(prefix.id)
        with pytest.raises(StorageError, match=r"quota is .* pinned; raise the quota or unpin"):
            save(store, "h9")
        assert len(store.prefixes.list()) == 2


def test_a_quota_holds_after_a_restart_and_a_lower_one_trims_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pitlane.db"
    with Store(path) as store:
        sizes = [save(store, f"h{number}", number + 1).num_bytes for number in range(4)]
        store.prefixes.pin(store.prefixes.list()[-1].id)
    with Store(path) as store:
        assert len(store.prefixes.list()) == 4, "a store that is opened to read trims nothing"
    for _ in range(2):
        with Store(path, quota_bytes=3 * max(sizes)) as store:
            assert [prefix.block_hash for prefix in store.prefixes.list()] == ["h3", "h2", "h0"]
    with Store(path, quota_bytes=1) as store:
        assert [prefix.block_hash for prefix in store.prefixes.list()] == ["h0"], "what is pinned stays"
        assert files(store) == [store.prefixes.list()[0].file]


def test_what_was_saved_under_a_quota_is_within_it_after_a_restart(tmp_path: Path) -> None:
    path, quota = tmp_path / "pitlane.db", 3 * KV_BYTES + 100
    with Store(path, quota_bytes=quota) as store:
        for number in range(4):
            save(store, f"h{number}")
        kept = files(store)
        assert kept and store.prefixes.total_bytes() <= quota
    with Store(path, quota_bytes=quota) as store:
        assert files(store) == kept


def test_remove_and_unknown_ids(store: Store) -> None:
    saved = save(store)
    with pytest.raises(NotFound, match=f"no saved prefix 99; saved are: {saved.id}"):
        store.prefixes.remove(99)
    with pytest.raises(NotFound):
        store.prefixes.pin(99)
    store.prefixes.remove(saved.id)
    assert files(store) == [] and store.prefixes.list() == []


def test_removing_a_document_removes_its_prefixes(store: Store) -> None:
    store.documents.add(Document("a.pdf", "application/pdf", (Page(0, "1", "x"),), "d" * 64))
    store.prefixes.save("fp", "h1", [1], kv(), document_hash="d" * 64)
    kept = save(store, "h2")
    store.documents.remove("a.pdf")
    assert files(store) == [kept.file]


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(damage_truncate, "bytes"), (damage_flip, "checksum"), (damage_empty, "0 bytes"), (damage_remove, "gone")],
)
def test_a_damaged_file_is_named_discarded_and_saved_anew(store: Store, damage: object, reason: str) -> None:
    saved = save(store)
    assert callable(damage)
    damage(store.prefixes.folder / saved.file)
    with pytest.raises(PrefixMismatch, match=reason):
        store.prefixes.load(saved)
    store.prefixes.discard(saved)
    assert store.prefixes.find("fp", ["h1"]) == [] and files(store) == []
    assert torch.equal(store.prefixes.load(save(store))["group0.values"], kv()["group0.values"])


@pytest.mark.parametrize("column", ["fingerprint", "block_hash", "num_tokens"])
def test_metadata_that_disagrees_with_the_row(store: Store, column: str) -> None:
    saved = save(store)
    with store.transaction() as db:
        db.execute(f"UPDATE prefixes SET {column} = ?", (999,))
    (row,) = store.prefixes.list()
    with pytest.raises(PrefixMismatch, match=f"says {column} = .*999"):
        store.prefixes.load(row)
    if column == "num_tokens":
        with pytest.raises(PrefixMismatch, match="32 token ids"):
            store.prefixes.token_ids(row)
    assert row.id == saved.id


def test_a_file_that_is_no_safetensors_although_its_checksum_fits(store: Store) -> None:
    saved = save(store)
    path = store.prefixes.folder / saved.file
    path.write_bytes(b"\xff" * saved.num_bytes)
    with store.transaction() as db:
        db.execute("UPDATE prefixes SET checksum = ?", (blobs.checksum(path),))
    with pytest.raises(PrefixMismatch, match="cannot be read"):
        store.prefixes.load(store.prefixes.list()[0])


def test_checksum_depends_on_every_piece_and_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_PIECE", 64)
    sums = set()
    for number, data in enumerate([b"", b"a", b"a" * 64 + b"b" * 64, b"b" * 64 + b"a" * 64, b"a" * 64, b"a" * 65]):
        (tmp_path / str(number)).write_bytes(data)
        sums.add(blobs.checksum(tmp_path / str(number)))
    assert len(sums) == 6


def test_discard_does_not_touch_what_was_saved_anew(store: Store) -> None:
    old = save(store)
    store.prefixes.discard(old)
    new = save(store)
    store.prefixes.discard(old)
    assert new.id != old.id and files(store) == [new.file]


def test_loaded_tensors_survive_removal(store: Store) -> None:
    saved = save(store)
    loaded = store.prefixes.load(saved)
    store.prefixes.remove(saved.id)
    assert torch.equal(loaded["group0.keys"], kv()["group0.keys"])


def test_a_full_disk_is_named_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = save(store, "kept")
    monkeypatch.setattr(blobs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"MB are needed, 0 MB are free; free some disk space"):
        save(store)
    monkeypatch.undo()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blobs.os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left"):
        save(store)
    monkeypatch.undo()
    assert files(store) == [kept.file] and len(store.prefixes.list()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_write_that_fails_half_way(store: Store) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot save a prefix .*too large"):
            store.prefixes.save("fp", "h", [1], {"a": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(store) == [] and store.prefixes.list() == []


def test_opening_cleans_what_crashes_left(tmp_path: Path) -> None:
    with Store(tmp_path / "pitlane.db") as store:
        lost, kept = save(store, "lost"), save(store, "kept")
        folder = store.prefixes.folder
    (folder / lost.file).unlink()
    for name in ("no-row.safetensors", "old.tmp", ".tmpOld", "young.tmp", "notes.txt"):
        (folder / name).write_bytes(b"x")
    for name in ("old.tmp", ".tmpOld"):
        os.utime(folder / name, (time.time() - 7200,) * 2)
    with Store(tmp_path / "pitlane.db") as store:
        assert files(store) == sorted([kept.file, "young.tmp", "notes.txt"])
        assert [prefix.block_hash for prefix in store.prefixes.list()] == ["kept"]


CHILD = """
import sys, time, torch
from pathlib import Path
from pitlane.storage.db import Store
folder, mark, count, same = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "same"
with Store(folder / "pitlane.db") as store:
    (folder / f"ready{mark}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    for number in range(count):
        key = f"h{number}" if same else f"{mark}h{number}"
        store.prefixes.save("fp", key, range(number + 1), {"a": torch.full((1 << 19,), float(mark))})
"""


def start(folder: Path, mark: int, count: int, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(mark), str(count), how])


def await_file(path: Path, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline, f"{path.name} was never made"
        time.sleep(0.005)


def test_two_processes_saving_the_same_prefixes(tmp_path: Path) -> None:
    children = [start(tmp_path, mark, 8, "same") for mark in (1, 2)]
    for mark, child in zip((1, 2), children, strict=True):
        await_file(tmp_path / f"ready{mark}", child)
    (tmp_path / "go").touch()
    assert [child.wait(60) for child in children] == [0, 0]
    with Store(tmp_path / "pitlane.db") as store:
        saved = store.prefixes.list()
        assert len(saved) == 8 and files(store) == sorted(prefix.file for prefix in saved)
        for prefix in saved:
            values = store.prefixes.load(prefix)["a"]
            assert values[0] in (1.0, 2.0) and bool((values == values[0]).all())


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    chance = random.Random(0)
    num_saved = 0
    (tmp_path / "go").touch()
    for mark in range(3):
        child = start(tmp_path, mark, 10_000, "other")
        await_file(tmp_path / f"ready{mark}", child)
        time.sleep(chance.uniform(0.02, 0.2))
        child.kill()
        child.wait()
        with Store(tmp_path / "pitlane.db") as store:
            saved = store.prefixes.list()
            whole = [name for name in files(store) if not blobs.temporary(Path(name))]
            assert whole == sorted(prefix.file for prefix in saved)
            for prefix in saved:
                values = store.prefixes.load(prefix)["a"]
                assert bool((values == float(prefix.block_hash.partition("h")[0])).all())
            num_saved += len(saved)
            store.prefixes.prune(0)
            store.prefixes.save("fp", f"{mark}h0", [1], {"a": torch.full((8,), float(mark))})
    assert num_saved > 3, "the children were killed before they saved anything"
