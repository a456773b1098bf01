"""Huge pages for weights: an entry of the processor's address cache (TLB) then serves 2 MB instead of 4 kB.

Linux gives huge pages to memory that a program has allocated and not yet written, if the administrator allows huge pages. On other
systems nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

HUGE_PAGE = 2 * 2**20
ADVICE = 14  # MADV_HUGEPAGE


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages for the memory of a new tensor on a CPU; return the tensor. The first write takes the pages."""
    advise = _advise()
    if advise is None or tensor.device.type != "cpu" or tensor.nbytes < HUGE_PAGE:
        return tensor
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ADVICE)  # a refusal changes nothing
    return tensor


@cache
def _advise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
