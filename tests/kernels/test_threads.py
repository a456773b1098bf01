"""The kernels' threads: no call waits for a helper without processor time; several callers at once; a forked child."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pytest
import torch

from pitlane.kernels import linear

Product: TypeAlias = tuple[linear.Packed, torch.Tensor, torch.Tensor]
here = pytest.mark.skipif(linear.unavailable() is not None, reason=str(linear.unavailable()))

# Prints the time of two threads relative to one thread, when they share one processor.
ON_ONE_PROCESSOR = """
import os, statistics, time, torch
from pitlane.kernels.linear import Packed
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
weights = [Packed(torch.randn(768, 256).bfloat16()) for _ in range(20)]
x = torch.randn(1, 256).bfloat16()
def seconds(threads):
    torch.set_num_threads(threads)
    start = time.perf_counter()
    for weight in weights:
        weight(x)
    return time.perf_counter() - start
seconds(1), seconds(2)
print(statistics.median(seconds(2) for _ in range(30)) / statistics.median(seconds(1) for _ in range(30)))
"""


@pytest.fixture
def product() -> Iterator[Product]:
    """A weight large enough for two threads, some inputs, and the outputs that one thread computes."""
    generator = torch.Generator().manual_seed(0)
    weight = linear.Packed(torch.randn(2048, 256, generator=generator).bfloat16())
    x = torch.randn(40, 256, generator=generator).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield weight, x, weight(x)
    torch.set_num_threads(before)


@here
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be kept on one processor here")
def test_a_helper_without_processor_time_is_not_waited_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_PROCESSOR], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 3


@here
def test_callers_at_once_get_their_own_results(product: Product) -> None:
    weight, x, expected = product

    def equal_each_time(_: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(weight(x), expected) for _ in range(200))

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(equal_each_time, range(3)))


@here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_helpers_of_its_own(product: Product) -> None:
    weight, x, expected = product
    torch.set_num_threads(2)
    weight(x)
    wanted = expected.view(torch.int16).numpy().tobytes()
    child = os.fork()
    if child == 0:  # no operation of torch here: its own threads do not survive a fork
        os._exit(0 if weight(x).view(torch.int16).numpy().tobytes() == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
