"""The slow tier runs a sample of every long proof; with `--whole` it runs the full proof. Collected here, not run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROOFS = ["engine/test_identity.py", "engine/run/test_batching.py", "ui/test_cli_batch.py"]


COLLECT = """
import json, sys
import pytest

class Items:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid.partition("::")[2] for item in session.items]

for flags in ([], ["--whole"]):  # in one process: importing torch takes longer than all the rest
    items = Items()
    assert pytest.main(["--collect-only", "-qqq", "-m", "slow", *flags, *sys.argv[1:]], [items]) == 0
    print("ids", json.dumps(items.ids))
"""


def collected() -> list[dict[str, set[str]]]:
    """The parameters of the slow tests by test name: without and with `--whole`."""
    command = [sys.executable, "-c", COLLECT, *(str(TESTS / proof) for proof in PROOFS)]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    collections = []
    for line in result.stdout.splitlines():
        if line.startswith("ids "):
            sizes: dict[str, set[str]] = {}
            for test_id in json.loads(line.removeprefix("ids ")):
                name, _, parameters = test_id.rstrip("]").partition("[")
                sizes.setdefault(name, set()).add(parameters)
            collections.append(sizes)
    return collections


def test_a_long_proof_has_a_sample_and_a_full_size() -> None:
    sample, whole = collected()
    assert sample.keys() == whole.keys() and "test_many_kills_lose_and_double_no_line" in whole
    for name, parameters in sample.items():
        assert parameters and parameters != whole[name], name
        if any("piece" in parameter for parameter in parameters):
            assert parameters < whole[name] and len(whole[name]) >= 3 * len(parameters), name
    float64 = whole["test_all_tokens_are_plain_tokens_in_float64"]
    assert len(float64) == 25 * 3 * 3 and "piece24-1.2-bundled" in float64
    assert len(whole["test_only_ties_below_the_measured_rounding_differ"]) == 7 * 18
    assert {"200-64-greedy", "200-64-sampled"} <= whole["test_the_same_tokens_in_every_way_to_run_them"]
    assert whole["test_many_kills_lose_and_double_no_line"] == {"1500-25"}
