"""The step in C under sanitizers: races, wrong addresses, and chunks that are computed twice."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pitlane.kernels import step

CPU = Path(__file__).parents[2] / "kernels" / "cpu"
SOURCES = [path for path in CPU.glob("*.c") if not path.name.startswith("module")]
COMPILER = shutil.which("cc") or shutil.which("gcc")
NEVER, AT_ONCE = "-DPATIENCE=(1ULL<<62)", "-DPATIENCE=0"
# A chunk that is computed twice is written twice, with the same bytes: that is a race by design. So threads are checked for races
# where none is patient enough to compute a chunk of another thread.
BUILDS = {
    "threads": ("-fsanitize=thread", NEVER),
    "addresses": ("-fsanitize=address,undefined", AT_ONCE),
    "plain": ("-O3", AT_ONCE),
}


@pytest.mark.slow
@pytest.mark.skipif(step.unavailable(32) is not None, reason=str(step.unavailable(32)))
@pytest.mark.skipif(COMPILER is None or not CPU.is_dir(), reason="no compiler, or no sources")
@pytest.mark.parametrize("build", BUILDS)
def test_threads_give_the_bits_of_one_thread_and_no_sanitizer_complains(build: str, tmp_path: Path) -> None:
    program = tmp_path / "step_check"
    sources = [Path(__file__).with_name("step_check.c"), *SOURCES]
    flags = ["-std=c11", "-O1", "-g", f"-I{CPU}", "-pthread", *BUILDS[build]]
    subprocess.run([str(COMPILER), *flags, *map(str, sources), "-o", str(program), "-lm"], check=True, timeout=900)
    recomputed = 0
    for threads, callers in ((1, 1), (2, 1), (3, 1), (8, 1), (2, 3)):
        arguments = [str(program), "20", str(threads), str(callers)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        recomputed += int(re.findall(r"(\d+) chunks", done.stdout)[0])
    assert (recomputed > 0) == (AT_ONCE in BUILDS[build])
