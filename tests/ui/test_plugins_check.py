"""`pitlane plugins check`: a false claim of `identical` is shown, an honest one is not doubted."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import pitlane
from pitlane.storage import certificates
from pitlane.testing import Finding, PluginCheck
from pitlane.ui.catalogue import code_hash
from pitlane.ui.cli import main

LOOSE = str(Path(__file__).parent / "test_cli_plugins")


def check(name: str, *args: str) -> Result:
    command = ["plugins", "check", name, "--plugins-dir", LOOSE, "-m", "random:tiny", "--tokens", "12"]
    return CliRunner().invoke(main, [*command, *args])


@pytest.mark.parametrize("name", ["liar", "cooler"])
def test_a_false_claim_is_shown(name: str) -> None:
    result = check(name)
    assert result.exit_code == 1
    first, *lines = result.stdout.splitlines()
    assert first == f"{name} declares identical: does not keep its promise"
    clause, reason = ("exactness", "differs at token") if name == "liar" else ("hooks", "declared identical")
    assert [line for line in lines if line.split()[:2] == [clause, "failed"] and reason in line], result.stdout


def test_an_honest_claim_is_proved_and_the_certificate_is_kept() -> None:
    result = check("prompt_lookup", "--json")
    assert result.exit_code == 0
    outcome = json.loads(result.stdout)
    assert outcome["num_draft_tokens"] > 100, "a drafter that does not pay is not paused"
    expected = {"name": "prompt_lookup", "source": "built-in", "declared": "identical", "proved": True, "broken": []}
    assert {key: outcome[key] for key in expected} == expected
    clauses = [finding["clause"] for finding in outcome["findings"]]
    assert {"docs", "options", "exactness", "off again", "two requests", "instance", "overhead"} <= set(clauses)
    code = code_hash(pitlane.PluginRegistry.load().get("prompt_lookup"))
    assert certificates.load("prompt_lookup", "built-in", pitlane.__version__, code) == outcome
    assert certificates.load("prompt_lookup", "pitlane-other 1.0", pitlane.__version__, code) is None
    assert certificates.load("prompt_lookup", "built-in", "0.0.1", code) is None
    assert certificates.load("prompt_lookup", "built-in", pitlane.__version__, "0") is None


def test_options_reach_the_plugin() -> None:
    result = check("prompt_lookup", "-o", "prompt_lookup.max_ngram=1")
    assert result.exit_code == 2 and "min_ngram must be at most max_ngram" in result.stderr
    result = check("prompt_lookup", "-o", "prompt_lookup.num_draft_tokens=1")
    assert result.exit_code == 0 and re.search(r"drafts +passed +\d+ draft tokens", result.stdout)


def test_a_plugin_comes_with_the_plugins_that_it_requires() -> None:
    result = check("needs_parrot")
    assert result.exit_code == 1, "its docstring lacks parts"
    assert "needs_parrot declares identical" in result.stdout and result.stdout.count(" failed ") == 1
    assert re.search(r"exactness +passed", result.stdout)


def test_a_plugin_that_steers_must_change_answers() -> None:
    result = check("endless")
    assert re.search(r"exactness +passed +\d+ of 12 answers change", result.stdout)


def test_an_approximate_plugin_is_proved_by_a_bound() -> None:
    measured, proved = check("int8"), check("int8", "--bound", "0.05")
    assert measured.exit_code == proved.exit_code == 0
    assert measured.stdout.startswith("int8 declares approximate: not proved on this machine")
    assert proved.stdout.startswith("int8 declares approximate: proved on this machine")
    assert check("int8", "--bound", "0.00001").exit_code == 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check passes without a run."""

    def check_plugin(name: str, options: Any, *, registry: Any, **_: Any) -> PluginCheck:
        plugin, source = registry.get(name), registry.entries[name].source
        finding = Finding("exactness", "passed", "")
        return PluginCheck(
            name, source, plugin.exactness, options, "random:tiny", "float64", 8, bound=0.05, findings=[finding]
        )

    monkeypatch.setattr("pitlane.testing.check_plugin", check_plugin)


def info(name: str, folder: Path) -> str:
    return CliRunner().invoke(main, ["plugins", "info", name, "--plugins-dir", str(folder)]).stdout


@pytest.mark.usefixtures("passes")
def test_a_certificate_ends_when_the_code_changes(tmp_path: Path) -> None:
    file = tmp_path / "liar.py"
    file.write_text((Path(LOOSE) / "liar.py").read_text())
    assert CliRunner().invoke(main, ["plugins", "check", "liar", "--plugins-dir", str(tmp_path)]).exit_code == 0
    assert "checked: identical, proved on this machine (random:tiny, float64, " in info("liar", tmp_path)
    file.write_text(file.read_text() + "# changed\n")
    text = info("liar", tmp_path)
    assert "checked:" not in text
    assert "  note: not checked on this machine since its code changed; type: pitlane plugins check liar" in text


def test_a_file_that_changes_during_its_check_gets_no_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: None
) -> None:
    file = tmp_path / "liar.py"
    file.write_text((Path(LOOSE) / "liar.py").read_text())
    checked = importlib.import_module("pitlane.testing").check_plugin

    def check_plugin(*args: Any, **keywords: Any) -> PluginCheck:
        file.write_text(file.read_text() + "# changed\n")
        outcome: PluginCheck = checked(*args, **keywords)
        return outcome

    monkeypatch.setattr("pitlane.testing.check_plugin", check_plugin)
    assert CliRunner().invoke(main, ["plugins", "check", "liar", "--plugins-dir", str(tmp_path)]).exit_code == 0
    assert "since its code changed" in info("liar", tmp_path), "the loaded code was checked, not the code of the file"


@pytest.mark.usefixtures("passes")
def test_a_certificate_names_its_conditions(tmp_path: Path) -> None:
    assert check("prompt_lookup", "-o", "prompt_lookup.max_ngram=3").exit_code == 0
    conditions = "(random:tiny, float64, bound 0.05, 8 tokens, with max_ngram=3)"
    assert f"checked: identical, proved on this machine {conditions}" in info("prompt_lookup", tmp_path)


@pytest.mark.usefixtures("passes")
def test_a_former_name_checks_the_plugin() -> None:
    result = check("paged_attention")
    assert result.exit_code == 0 and result.stdout.startswith("flash_attention declares"), result.output


def test_a_bound_that_every_plugin_keeps_is_refused() -> None:
    result = check("int8", "--bound", "1.0")
    assert result.exit_code == 2 and "'--bound'" in result.stderr


def test_what_cannot_be_checked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.engine.engine.Engine.__init__", lambda *_, **__: pytest.fail("loaded"))
    result = check("prompt_lokup")
    assert result.exit_code == 2 and "unknown plugin 'prompt_lokup'; known: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
