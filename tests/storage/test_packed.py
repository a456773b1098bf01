"""Packed copies: kept whole or not at all, found again, rebuilt when damaged, bounded by a size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pitlane.storage.packed import PackedCopies, packed_folders, remove_packed


def tensors(fill: int = 3, size: int = 70_000) -> dict[str, Tensor]:
    return {"packed": torch.full((size,), fill, dtype=torch.uint8), "scales": torch.ones(3)}


def test_a_copy_is_found_by_weights_and_recipe_alone() -> None:
    copies = PackedCopies("weights", "8 bits")
    assert copies.load("layer.q") is None
    copies.save("layer.q", tensors())
    found = PackedCopies("weights", "8 bits").load("layer.q")
    assert found is not None and {name: x.tolist() for name, x in found.items()} == {
        name: x.tolist() for name, x in tensors().items()
    }
    others = [PackedCopies("weights", "4 bits"), PackedCopies("other weights", "8 bits")]
    assert all(other.load("layer.q") is None for other in others) and copies.load("layer.k") is None
    (folder,) = packed_folders()
    assert folder.recipe == "8 bits" and folder.num_bytes > 70_000
    assert remove_packed(folder.name) == folder.num_bytes and packed_folders() == [] and remove_packed("x") == 0


@pytest.mark.parametrize("damage", ["a byte", "the end", "empty"])
def test_a_damaged_copy_is_deleted_with_a_line_in_the_log(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    copies = PackedCopies("weights", "8 bits")
    copies.save("q", tensors())
    (file,) = copies.folder.iterdir()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes({"a byte": bytes(data), "the end": bytes(data[:-100]), "empty": b""}[damage])
    assert copies.load("q") is None and not file.exists()
    assert "the packed copy of q" in caplog.text and "is damaged" in caplog.text
    copies.save("q", tensors())
    assert copies.load("q") is not None


def test_small_parts_are_not_kept_and_no_temporary_file_stays() -> None:
    copies = PackedCopies("weights", "8 bits")
    copies.save("small", tensors(size=100))
    assert not copies.folder.exists()
    copies.save("large", tensors())
    assert [file.name for file in copies.folder.iterdir()] == ["large.safetensors"]


def test_the_copies_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITLANE_CACHE_GB", "0.00025")
    models = [PackedCopies(str(i), "8 bits") for i in range(4)]
    for i, copies in enumerate(models[:3]):
        copies.save("q", tensors(i))
        os.utime(copies.folder, (100 + i, 100 + i))
    assert models[0].load("q") is not None  # now the second is the oldest
    models[3].save("q", tensors(3))
    assert [copies.load("q") is not None for copies in models] == [True, False, True, True]


def test_a_model_larger_than_the_cap_stops_at_the_cap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PITLANE_CACHE_GB", "0.00025")
    copies = PackedCopies("large", "8 bits")
    for i in range(6):
        PackedCopies("large", "8 bits").save(f"part {i}", tensors(i))
    (folder,) = packed_folders()
    assert 200_000 < folder.num_bytes <= 250_000
    assert [copies.load(f"part {i}") is not None for i in range(6)] == [True] * 3 + [False] * 3
    assert caplog.text.count("packed at every load") == 1


def test_a_disk_that_takes_no_copy_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies = PackedCopies("weights", "8 bits")
    copies.folder.parent.mkdir(parents=True)
    copies.folder.write_text("a file where the folder belongs")
    copies.save("q", tensors())
    assert "no packed copy of q is kept" in caplog.text
