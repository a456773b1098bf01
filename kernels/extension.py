"""Imports the C kernels (kernels/cpu), if this build has them, and says which models they serve."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

MISSING = "the package was built without a C compiler"

try:
    cpu: Any = import_module("pitlane.kernels._cpu")
except ImportError:
    cpu = None


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the C kernels cannot run a model of this dtype and device; None if they can."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return None
    return f"it is for bfloat16 on a CPU; the model runs in {str(dtype).removeprefix('torch.')} on {device}"
