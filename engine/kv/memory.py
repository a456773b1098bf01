"""The memory that a model needs, computed from its config before its weights are loaded. Sizes are in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import psutil
import torch

from pitlane.engine.errors import ModelTooLarge
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.weights import shapes_of

RESERVE = 512 * 2**20  # left for activations and the rest of the process


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory that a model takes: its weights, and KV per token of context."""

    weights: int
    kv_per_token: int

    @classmethod
    def of(cls, config: DecoderConfig, dtype: torch.dtype) -> Needs:
        """Count 2 * layers * kv_heads * head_dim values of KV per token, and every parameter once, all in `dtype`."""
        weights = sum(prod(shape) for shape in shapes_of(config).values()) * dtype.itemsize
        return cls(weights, config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize)


def available(device: torch.device) -> int:
    """Memory free now on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def gib(num_bytes: float) -> str:
    """Return a size as text, in GiB, MiB, KiB or B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def check_fit(name: str, needs: Needs, kv_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ModelTooLarge, with the sizes, if weights and KV do not fit into the free memory."""
    free = available(device)
    total = needs.weights + kv_bytes + RESERVE
    if total <= free:
        return
    smaller = "" if dtype.itemsize <= 2 else "use --dtype bfloat16, "
    raise ModelTooLarge(
        f"{name} needs {gib(needs.weights)} for weights in {str(dtype).removeprefix('torch.')}, {gib(kv_bytes)} for KV and "
        f"{gib(RESERVE)} to work in; {gib(free)} are free on {device}; {smaller}lower --context, or take a smaller model"
    )
