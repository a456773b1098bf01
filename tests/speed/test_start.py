"""SmolLM2 from its GGUF file, in a process of its own: memory at its peak, and time to the first token.

PITLANE_TEST_SMOLLM2 names the file. Run with `pytest -m slow -s tests/speed/test_start.py`, which prints the figures. The times are
bounds for a quiet machine with two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pitlane.kernels import linear

FILE = Path(os.environ.get("PITLANE_TEST_SMOLLM2", "-"))  # read here: a fixture clears these settings
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="PITLANE_TEST_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf"),
    pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not tell the peak of one process"),
]
RUN = [sys.executable, "-c", "from pitlane.ui.cli import main; main()", "run", "--json", "--max-tokens", "1", "hi"]
FIRST_SECONDS, SECONDS = 6.0, 3.5
OWN_BYTES = 300e6  # of Python, torch and the tokenizer, beside 1.3 times the weights
ROUNDS = 3


class Start(NamedTuple):
    """seconds: wall time of the process. cpu_seconds: of all its threads. peak: its largest memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak: int
    stats: dict[str, Any]


def start() -> Start:
    begin = time.monotonic()
    process = subprocess.Popen([*RUN, "--model", str(FILE)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.monotonic() - begin
    return Start(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, json.loads(text)["stats"])


@pytest.mark.skipif(linear.unavailable() is not None, reason="without packed weights, the weights stay in the file")
def test_a_start_of_smollm2(own_home: Path) -> None:
    first, *later = [start() for _ in range(ROUNDS + 1)]
    best = min(later, key=lambda run: run.seconds)
    for name, run in (("first", first), ("later", best)):
        print(f"{name}: {run.seconds:.1f} s, {run.cpu_seconds:.1f} s of processors, at most {run.peak / 1e6:.0f} MB")
    limit = 1.3 * first.stats["weight_bytes"] + OWN_BYTES
    assert max(run.peak for run in (first, *later)) <= limit
    assert first.seconds <= FIRST_SECONDS and best.seconds <= SECONDS
