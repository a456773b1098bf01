"""Huge pages: weights ask for them, and small tensors do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pitlane.kernels import pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds an address. The mapping must ask for huge pages."""
    is_here, num_bytes = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(value, 16) for value in first.split("-"))
            is_here = begin <= address < end
        elif is_here and first == "AnonHugePages:":
            num_bytes = int(line.split()[1]) * 1024
        elif is_here and first == "VmFlags:":
            assert "hg" in line.split(), "the mapping does not ask for huge pages"
            return num_bytes
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here")
def test_large_weights_lie_in_huge_pages() -> None:
    """The system may have no free huge pages for a moment, when other processes use much memory. So a few tries are allowed."""
    found = []
    for _ in range(5):
        tensor = pages.in_huge_pages(torch.empty(16 * pages.HUGE_PAGE, dtype=torch.uint8)).fill_(1)
        found.append(huge_bytes(tensor.data_ptr() + tensor.nbytes // 2))
        if found[-1] >= 8 * pages.HUGE_PAGE:
            return
        time.sleep(0.5)
    raise AssertionError(f"of {tensor.nbytes} bytes, {found} lie in huge pages")


def test_without_the_system_call_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.zeros(3)
    assert pages.in_huge_pages(small) is small
    monkeypatch.setattr(pages, "_advise", lambda: None)
    large = torch.empty(2 * pages.HUGE_PAGE, dtype=torch.uint8)
    assert pages.in_huge_pages(large) is large
