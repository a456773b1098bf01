"""The memory that a model needs under a plan, computed before its weights are loaded. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from pitlane.engine.errors import ModelTooLarge
from pitlane.engine.kv.capacity import MAX_STEP_TOKENS, GroupNeeds, seq_bytes
from pitlane.engine.models.weight_plan import WeightPlan

RESERVE = 512 * 2**20  # left for activations and the rest of the process


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory that a model takes. weights: its loaded weights. peak: most while they load. groups: its KV groups."""

    weights: int
    peak: int
    groups: tuple[GroupNeeds, ...]

    @classmethod
    def of(cls, weights: WeightPlan, groups: Sequence[GroupNeeds] = ()) -> Needs:
        return cls(weights.num_bytes, weights.peak_bytes, tuple(groups))

    @property
    def kv_per_token(self) -> int:
        """KV of a token in all layers."""
        return sum(group.bytes_per_token for group in self.groups)

    def kv_bytes(self, num_tokens: int) -> int:
        """KV of a sequence of `num_tokens` tokens. A layer with a window holds few tokens of a long sequence."""
        return seq_bytes(self.groups, num_tokens, MAX_STEP_TOKENS)

    @property
    def fixed_kv_bytes(self) -> int:
        """Memory of the KV stores beside their blocks."""
        return sum(group.fixed_bytes for group in self.groups)

    def total(self, kv_bytes: int) -> int:
        """Bytes that must be free to load the weights and then serve with `kv_bytes` of KV."""
        return max(self.peak, self.weights + kv_bytes) + RESERVE


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


def check_fit(
    name: str, needs: Needs, kv_bytes: int, dtype: torch.dtype, device: torch.device, plugins: Sequence[str] = ()
) -> None:
    """Raise ModelTooLarge, with the sizes, if weights and KV do not fit into the free memory.

    plugins: names of the plugins that make the weights.
    """
    free = available(device)
    if needs.total(kv_bytes) <= free:
        return
    made = "".join(f" with {plugin}" for plugin in plugins)
    loading = f" ({gib(needs.peak)} while they load)" if needs.peak > needs.weights + kv_bytes else ""
    smaller = "" if dtype.itemsize <= 2 else "use --dtype bfloat16, "
    raise ModelTooLarge(
        f"{name} needs {gib(needs.weights)} for weights in {str(dtype).removeprefix('torch.')}{made}{loading}, {gib(kv_bytes)} for "
        f"KV and {gib(RESERVE)} to work in; {gib(free)} are free on {device}; {smaller}lower --context, or take a smaller model"
    )
