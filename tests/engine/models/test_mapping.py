"""A stored tensor that was packed leaves the memory of the process, and can still be read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pitlane.engine.models.mapping import drop_pages, mapping_of
from pitlane.engine.models.weights import SafetensorsFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are dropped on Linux alone")
MEGABYTES = 32


def file_bytes() -> int:
    """Memory of this process that is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.fixture
def folder(tmp_path: Path) -> SafetensorsFolder:
    values = torch.arange(MEGABYTES * 2**18, dtype=torch.int32).view(torch.float32)
    save_file({"a": values, "b": values.flip(0).contiguous()}, tmp_path / "model.safetensors")
    return SafetensorsFolder(tmp_path)


def test_a_released_tensor_leaves_memory_and_stays_readable(folder: SafetensorsFolder) -> None:
    tensor, other = folder.get("a"), folder.get("b")
    expected, kept = tensor.view(torch.int32).sum(), other.view(torch.int32)[:5].tolist()
    before = file_bytes()
    folder.release("a")
    assert before - file_bytes() > 0.9 * MEGABYTES * 2**20
    assert tensor.view(torch.int32).sum() == expected and other.view(torch.int32)[:5].tolist() == kept


def test_memory_that_is_no_mapping_of_the_file_is_left_alone(folder: SafetensorsFolder, tmp_path: Path) -> None:
    own = torch.ones(2**20)
    file = tmp_path / "model.safetensors"
    assert mapping_of(file, own.data_ptr()) == range(0)
    assert mapping_of(tmp_path / "other.safetensors", folder.get("a").data_ptr()) == range(0)
    mapping = mapping_of(file, folder.get("a").data_ptr())
    assert len(mapping) >= 2 * MEGABYTES * 2**20
    for place in (range(0), mapping):
        drop_pages(place, own.data_ptr(), own.nbytes)
    assert bool((own == 1).all())
