"""The memory that this process has taken at most."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: str) -> int | None:
    """Return the most bytes taken so far: allocated on CUDA, else resident in memory. None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
