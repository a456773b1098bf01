"""Times of calls on a GPU and the ceilings of the device, for measure.py. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

ROUNDS = 15
MAX_ERROR = 2e-2  # relative to the largest value of the reference
COLD_BYTES = 2**28  # written before every timed call: more than the cache of a GPU
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """ms: of the kernel. fraction: of the ceiling of bytes or operations. error: relative, the largest. peers: their ms."""

    kernel: str
    shape: str
    error: float
    ms: float
    fraction: float
    peers: dict[str, float]

    @property
    def is_right(self) -> bool:
        return self.error <= MAX_ERROR


class Timer:
    """Times calls, and keeps the rows of the table.

    device: the GPU, or the CPU of the interpreter. bytes_per_second, operations_per_second: its measured ceilings.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny, self.rows = device, tiny, list[Measured]()
        self.cold = torch.empty(8 if tiny else COLD_BYTES, dtype=torch.uint8, device=device)
        size = 2**12 if tiny else 2**29
        source = torch.ones(size, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        self.bytes_per_second = 4 * size / self.times({"copy": lambda: target.copy_(source)})["copy"]
        side = 64 if tiny else 8192
        a = torch.randn(side, side, device=device).bfloat16()
        self.operations_per_second = 2 * side**3 / self.times({"product": lambda: a @ a})["product"]

    def times(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Median seconds of every call, in turn. A call that torch refuses on this device is left out."""
        rounds: dict[str, list[float]] = {}
        for name, call in calls.items():
            try:
                call()
                rounds[name] = []
            except (RuntimeError, NotImplementedError):
                if name == next(iter(calls)):
                    raise
        for _ in range(1 if self.tiny else ROUNDS):
            for name, seconds in rounds.items():
                self.cold.zero_()
                seconds.append(self.seconds(calls[name]))
        return {name: median(seconds) for name, seconds in rounds.items()}

    def seconds(self, call: Call) -> float:
        if self.device.type != "cuda":
            start = perf_counter()
            call()
            return perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def add(
        self,
        kernel: str,
        shape: str,
        error: float,
        call: Call,
        num_bytes: float,
        operations: float = 0,
        peers: Mapping[str, Call] | None = None,
    ) -> None:
        """Measure a kernel. Its ceiling is the longer of the times for its bytes and for its operations."""
        times = self.times({"": call, **(peers or {})})
        seconds = times.pop("")
        limit = max(num_bytes / self.bytes_per_second, operations / self.operations_per_second)
        others = {name: value * 1e3 for name, value in times.items()}
        self.rows.append(Measured(kernel, shape, error, seconds * 1e3, limit / seconds, others))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(torch.float16 if self.tiny else torch.bfloat16)


def error_of(result: Tensor, reference: Tensor) -> float:
    """The largest error, relative to the largest value of the reference."""
    return float((result.float() - reference.float()).abs().max() / reference.float().abs().max())
