"""Huge pages: weights ask for them, and small tensors do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pitlane.kernels import pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds an address."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(value, 16) for value in first.split("-"))
            is_here = begin <= address < end
        elif is_here and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here")
def test_large_weights_lie_in_huge_pages() -> None:
    tensor = pages.in_huge_pages(torch.empty(16 * pages.HUGE_PAGE, dtype=torch.uint8)).fill_(1)
    assert huge_bytes(tensor.data_ptr() + tensor.nbytes // 2) >= 8 * pages.HUGE_PAGE


def test_without_the_system_call_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.zeros(3)
    assert pages.in_huge_pages(small) is small
    monkeypatch.setattr(pages, "_advise", lambda: None)
    large = torch.empty(2 * pages.HUGE_PAGE, dtype=torch.uint8)
    assert pages.in_huge_pages(large) is large
