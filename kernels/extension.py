"""Imports the C kernels (kernels/cpu), if this build has them, and says which models and CPUs they serve."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

MISSING = "the package was built without a C compiler"
LEVELS = ("plain", "avx2", "avx512", "amx")  # of the kernels; PITLANE_CPU_KERNELS names the highest level to use

try:
    cpu: Any = import_module("pitlane.kernels._cpu")
except ImportError:
    cpu = None


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the C kernels cannot run a model of this dtype and device; None if they can."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return None
    return f"it is for bfloat16 on a CPU; the model runs in {str(dtype).removeprefix('torch.')} on {device}"


def without_vectors() -> str | None:
    """Why the kernels for bfloat16, float8 and attention have no vectors here; None if they have."""
    if cpu is None:
        return MISSING
    if cpu.vectors_level():
        return None
    if os.environ.get("PITLANE_CPU_KERNELS") == "plain":
        return "PITLANE_CPU_KERNELS = plain allows no vectors; unset it"
    return "this CPU has no AVX2 with FMA"


def key_by_level(key: str) -> str:
    """The key of a plugin whose results depend on the vectors: AVX2 sums in another order than AVX-512."""
    return key if cpu is None or LEVELS[cpu.vectors_level()] != "avx2" else f"{key} avx2"
