"""The slow tier runs a sample of every long proof; with `--whole` it runs the full proof. Collected here, not run.

The package of a test that is skipped without its package is in an extra, so that `.ci/run` skips no such test.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PROOFS = ["engine/test_identity.py", "engine/run/test_batching.py", "ui/test_cli_batch.py"]
# Single cases of tests of the default tier. They are short, and `--whole` changes nothing.
CASES = {
    "test_all_drafters_in_one_batch_give_plain_tokens",
    "test_all_drafters_on_a_random_gemma_give_plain_tokens",
    "test_no_fake_drafter_changes_a_token",
}
BUILT_BY_HAND = {"llama_cpp"}  # has no wheel


class Items:
    """A plugin of a nested run of pytest: keeps the names of the collected tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ids = [item.nodeid.partition("::")[2] for item in session.items]


def collected(*flags: str, mark: str = "slow", files: Sequence[str] = PROOFS) -> dict[str, set[str]]:
    """The parameters of the tests by test name. Collected in this process, because it has imported nearly all their modules."""
    items = Items()
    proofs = [str(TESTS / file) for file in files]
    options = ["--collect-only", "-qqq", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", mark]
    assert pytest.main([*options, *flags, *proofs], [items]) == 0
    sizes: dict[str, set[str]] = {}
    for test_id in items.ids:
        name, _, parameters = test_id.rstrip("]").partition("[")
        sizes.setdefault(name, set()).add(parameters)
    return sizes


def test_a_long_proof_has_a_sample_and_a_full_size() -> None:
    sample, whole = collected(), collected("--whole")
    assert sample.keys() == whole.keys() and "test_many_kills_lose_and_double_no_line" in whole
    assert sample.keys() >= CASES
    for name, parameters in sample.items():
        if name in CASES:
            assert parameters == whole[name]
            continue
        assert parameters and parameters != whole[name], name
        if any("piece" in parameter for parameter in parameters):
            assert parameters < whole[name] and len(whole[name]) >= 3 * len(parameters), name
    float64 = whole["test_all_tokens_are_plain_tokens_in_float64"]
    assert len(float64) == 25 * 3 * 3 and "piece24-1.2-bundled" in float64
    assert len(whole["test_only_ties_below_the_measured_rounding_differ"]) == 7 * 18
    assert {"200-64-greedy", "200-64-sampled"} <= whole["test_the_same_tokens_in_every_way_to_run_them"]
    assert whole["test_many_kills_lose_and_double_no_line"] == {"1500-25"}


def test_a_covering_sample_has_every_pair_of_values() -> None:
    """The default tier runs a sample of a test with four parameters; both tiers together run the whole product."""
    name, files = "test_sinks_are_read_in_the_format_of_the_store", ["plugins/test_kv_quant.py"]
    sample, rest = (
        {tuple(enumerate(values.split("-"))) for values in collected(mark=mark, files=files)[name]}
        for mark in ("not slow", "slow")
    )
    pairs, all_pairs = (
        {pair for values in group for pair in combinations(values, 2)} for group in (sample, sample | rest)
    )
    assert pairs == all_pairs and not sample & rest
    assert len(sample | rest) == 36 and len(sample) <= 12


def test_the_packages_of_skipped_tests_are_in_an_extra() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = " ".join(project["optional-dependencies"]["test"] + project["optional-dependencies"]["docs"])
    texts = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")]
    packages = {name for text in texts for name in re.findall(r'importorskip\("(\w+)', text)}
    own = {path.stem for path in TESTS.parent.glob("examples/*/src/*")}
    missing = {name for name in packages - own - BUILT_BY_HAND if name.replace("_", "-") not in extras}
    assert not missing and "compressed_tensors" in packages
