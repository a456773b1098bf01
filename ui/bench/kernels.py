"""Rates of the linear kernels in C, beside a plain read of the same bytes and beside the processor's rate of products.

A time is measured in turn with the time of a read of as many bytes (`probe`): each thread sums its own contiguous half. Weights are
cycled through a pool that is larger than the cache, so that they come from memory. `of_probe`: time of the read / time of the
kernel. `of_ceiling`: rate of products / rate of the same instructions on registers alone, measured in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import copy
from statistics import median
from typing import Any, NamedTuple

POOL_BYTES = 384 * 2**20
QUICK_POOL_BYTES = 96 * 2**20
ROWS, QUICK_ROWS = (1, 2, 4, 8, 16, 64, 512), (1, 4, 16)
SHAPES, QUICK_SHAPES = ((8192, 2048), (2048, 8192), (1536, 576)), ((8192, 2048),)
BUDGET, QUICK_BUDGET = 1.0, 0.3  # seconds per line of the table


class Kernel(NamedTuple):
    """make: (weight [N, K] bfloat16) -> the linear. weights: its attribute that holds them. ceiling: the kind of its products."""

    make: Callable[[Any], Any]
    weights: str
    ceiling: str

    def copied(self, linear: Any) -> Any:
        """The linear with weights at another place in memory."""
        other = copy(linear)
        setattr(other, self.weights, getattr(linear, self.weights).clone())
        return other


def kernels() -> dict[str, Kernel]:
    """The linears that this machine can run, by label."""
    import torch

    from pitlane.kernels import linear, quantized
    from pitlane.kernels.extension import cpu
    from pitlane.kernels.quantized import Format, Quantized

    table: dict[str, Kernel] = {}
    if linear.unavailable() is None:
        table["bf16"] = Kernel(linear.Packed, "weight", "bf16")
    forms = {
        "int8": Format(8),
        "int8, inputs bfloat16": Format(8, False),
        "int4 g32": Format(4, True, 32, False),
        "int4 g32 symmetric": Format(4, True, 32, True),
        "int4 g32, inputs bfloat16": Format(4, False, 32, False),
        "int4 g64": Format(4, True, 64, False),
        "int4 g128": Format(4, True, 128, False),
    }
    for label, form in forms.items():
        if quantized.unavailable(form, torch.bfloat16, torch.device("cpu")) is None:

            def make(weight: Any, form: Format = form) -> Quantized:
                outputs, inputs = weight.shape
                return Quantized(outputs, inputs, form, [weight], level=cpu.int_level())

            ceiling = "int8" if form.quantized else "float32"
            table[label] = Kernel(make, "packed", ceiling)
    return table


def ceilings() -> dict[str, float]:
    """Products and sums per second (2 per multiply-add) of all threads, on registers alone, by kind of number."""
    import torch

    from pitlane.kernels.extension import cpu

    if cpu is None:
        return {}
    names = ("float32", "bf16", "int8")
    rates = {
        name: max(cpu.ceiling(kind, torch.get_num_threads(), 0.1) for _ in range(3)) for kind, name in enumerate(names)
    }
    return {name: rate for name, rate in rates.items() if rate}


def measure(quick: bool = False, advance: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Measure all kernels. Returns the ceilings and a list of lines: kernel, shape, M, microseconds and the two fractions."""
    shapes, counts = (QUICK_SHAPES, QUICK_ROWS) if quick else (SHAPES, ROWS)
    table, limits, lines = kernels(), ceilings(), list[dict[str, Any]]()
    total = len(table) * len(shapes) * len(counts)
    for label, kernel in table.items():
        for shape in shapes:
            for line in _lines(kernel, shape, counts, quick, limits.get(kernel.ceiling)):
                lines.append({"kernel": label, **line})
                if advance is not None:
                    advance(len(lines), total)
    return {"ceilings": limits, "lines": lines}


def _lines(
    kernel: Kernel, shape: tuple[int, int], counts: tuple[int, ...], quick: bool, ceiling: float | None
) -> Iterator[dict[str, Any]]:
    import torch

    from pitlane.kernels.extension import cpu

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    first = kernel.make(weight)
    size = getattr(first, kernel.weights).nbytes
    copies = max(2, min(64, (QUICK_POOL_BYTES if quick else POOL_BYTES) // size))
    pool = [first, *(kernel.copied(first) for _ in range(copies - 1))]
    probe = [torch.ones(size, dtype=torch.uint8) for _ in range(copies)]
    threads = torch.get_num_threads()
    for rows in counts:
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        times, reads, index = list[float](), list[float](), 0
        stop = time.perf_counter() + (QUICK_BUDGET if quick else BUDGET)
        while time.perf_counter() < stop or len(times) < 5:
            index = (index + 1) % copies
            start = time.perf_counter()
            pool[index](x)
            middle = time.perf_counter()
            cpu.read_bytes(probe[index].data_ptr(), size, threads)
            times.append(middle - start)
            reads.append(time.perf_counter() - middle)
        seconds, read = median(times), median(reads)
        rate = 2 * rows * shape[0] * shape[1] / seconds
        yield {
            "outputs": shape[0],
            "inputs": shape[1],
            "rows": rows,
            "weight_bytes": size,
            "us": round(1e6 * seconds, 1),
            "probe_us": round(1e6 * read, 1),
            "best_us": round(1e6 * min(times), 1),
            "best_probe_us": round(1e6 * min(reads), 1),
            "gb_per_s": round(size / seconds / 1e9, 2),
            "of_probe": round(read / seconds, 3),
            "gop_per_s": round(rate / 1e9, 1),
            "of_ceiling": round(rate / ceiling, 3) if ceiling else None,
            "n": len(times),
        }
