"""Files in one step: the new file or the former file, never a part, and no temporary file after an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pitlane.storage.errors import StorageError
from pitlane.storage.files import replacing, write_whole
from pitlane.storage.home import cache_limit


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "é")
    assert file.read_bytes() == "é".encode()
    with replacing(file) as part:
        part.write_bytes(b"new")
        assert file.read_bytes() == "é".encode() and part.parent == tmp_path
        assert part.suffix == f".{os.getpid()}", "the name shows which process may still write"
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]
    write_whole(file, b"third", tmp_path / "a.json.part")
    assert file.read_bytes() == b"third" and list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_former_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, b"former")
    with pytest.raises(KeyboardInterrupt), replacing(file) as part:
        part.write_bytes(b"ne")
        raise KeyboardInterrupt

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"former" and list(tmp_path.iterdir()) == [file]


def test_the_limit_of_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PITLANE_CACHE_GB", raising=False)
    assert cache_limit(5) == 5
    monkeypatch.setenv("PITLANE_CACHE_GB", "0.5")
    assert cache_limit(5) == 500_000_000
    for text in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("PITLANE_CACHE_GB", text)
        with pytest.raises(StorageError, match="PITLANE_CACHE_GB must be a number of gigabytes above 0"):
            cache_limit(5)
