"""`pitlane plugins new`: the package is complete; installed, it is found and passes its check and its own tests at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from pitlane import PluginRegistry
from pitlane.testing import check_plugin
from pitlane.ui import template
from pitlane.ui.cli import main

LIMIT = 60.0  # seconds from `plugins new` to a passing check


def test_the_package_is_written_and_its_plugin_keeps_its_promise(tmp_path: Path) -> None:
    folder = tmp_path / "my"
    result = CliRunner().invoke(main, ["plugins", "new", "my-idea", "--into", str(folder)])
    assert result.exit_code == 0 and f"pip install -e {folder} && pitlane plugins check my_idea" in result.stdout
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert paths == {
        "pyproject.toml", "pitlane_my_idea.py", "tests/test_my_idea.py", "README.md", ".gitignore",
        ".github/workflows/test.yml",
    }  # fmt: skip
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pitlane"] == {"my_idea": "pitlane_my_idea:MyIdea"}
    registry = PluginRegistry.load(folder)
    check_plugin("my_idea", {"match": 1}, registry=registry, num_tokens=24).assert_proved()
    again = CliRunner().invoke(main, ["plugins", "new", "my-idea", "--into", str(folder)])
    assert again.exit_code == 2 and "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("idea", "reason"),
    [("7up", "begins with a letter"), ("a/b", "begins with a letter"), ("class", "begins with a letter"),
     ("prompt-lookup", "a plugin 'prompt_lookup' is here already (built-in)")],
)  # fmt: skip
def test_a_bad_name_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idea: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["plugins", "new", idea])
    assert (
        result.exit_code == 2
        and reason in result.stderr
        and repr(idea)[1:-1].replace("-", "_") in result.stderr.replace("-", "_")
    )
    assert list(tmp_path.iterdir()) == [] or [path.name for path in tmp_path.iterdir()] == ["pitlane-home"]


def test_names_of_package_module_and_class() -> None:
    texts = template.files("Pitlane_my.great  idea")
    assert "pitlane_my_great_idea.py" in texts and 'name = "pitlane-my-great-idea"' in texts["pyproject.toml"]
    assert "class MyGreatIdea(Plugin):" in texts["pitlane_my_great_idea.py"]


@pytest.mark.slow
def test_from_new_to_a_passing_check(tmp_path: Path, own_home: Path) -> None:
    """In a fresh environment that sees the packages of this one: written, installed without network, checked, tested, gone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(lines))
    environment = {name: value for name, value in os.environ.items() if name != "PITLANE_LOAD"}
    environment |= {"PITLANE_HOME": str(own_home), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*args: str) -> str:
        result = subprocess.run(
            [str(python), *args], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{args}: {result.stdout}\n{result.stderr}"
        return result.stdout

    pitlane = ("-c", "from pitlane.ui.cli import main; main()")
    started = time.perf_counter()
    run(*pitlane, "plugins", "new", "my-idea")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "pitlane-my-idea")
    certificate = json.loads(run(*pitlane, "plugins", "check", "my_idea", "--json"))
    assert time.perf_counter() - started < LIMIT
    assert certificate["proved"] and certificate["source"] == "pitlane-my-idea 0.1.0"
    assert "3 passed" in run("-m", "pytest", "-q", "pitlane-my-idea")
    run("-m", "pip", "uninstall", "-q", "-y", "pitlane-my-idea")
    assert "my_idea" not in run(*pitlane, "plugins", "list")
