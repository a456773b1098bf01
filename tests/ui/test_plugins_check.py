"""`pitlane plugins check`: a false claim of `identical` is shown, an honest one is not doubted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pitlane.ui.cli import main

LOOSE = str(Path(__file__).parent / "test_cli_plugins")


def check(name: str, *args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "check", name, "--plugins-dir", LOOSE, "-m", "random:tiny", *args])


@pytest.mark.parametrize("name", ["liar", "cooler"])
def test_a_false_claim_is_shown(name: str) -> None:
    result = check(name)
    assert result.exit_code == 1
    first, *lines = result.stdout.splitlines()
    assert first == f"{name} declares identical; 4 answers compared: does not keep its promise"
    assert len(lines) == 4
    assert all(("differs" if name == "liar" else "declared identical") in line for line in lines)


def test_an_honest_claim_is_not_doubted() -> None:
    result = check("prompt_lookup", "--json")
    assert result.exit_code == 0
    outcome = json.loads(result.stdout)
    assert outcome.pop("num_draft_tokens") > 100, "a drafter that does not pay is not paused"
    assert outcome == {"name": "prompt_lookup", "exactness": "identical", "num_answers": 4, "broken": []}


def test_options_reach_the_plugin() -> None:
    result = check("prompt_lookup", "-o", "prompt_lookup.max_ngram=1")
    assert result.exit_code == 2 and "min_ngram must be at most max_ngram" in result.stderr
    result = check("prompt_lookup", "-o", "prompt_lookup.num_draft_tokens=1")
    assert result.exit_code == 0 and re.search(r"4 answers compared, \d+ draft tokens: nothing", result.stdout)


def test_a_plugin_comes_with_the_plugins_that_it_requires() -> None:
    result = check("needs_parrot")
    assert result.exit_code == 0 and result.stdout.startswith("needs_parrot declares identical; 4 answers compared, ")


def test_a_plugin_that_steers_is_not_compared() -> None:
    result = check("endless")
    assert result.exit_code == 0 and "endless declares steering; 4 answers, not compared" in result.stdout


def test_what_cannot_be_checked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.engine.engine.Engine.__init__", lambda *_, **__: pytest.fail("loaded"))
    result = check("prompt_lokup")
    assert result.exit_code == 2 and "unknown plugin 'prompt_lokup'; known: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
