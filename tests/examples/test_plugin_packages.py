"""The plugin packages of examples/: they compose, and install, run, and uninstall as packages of strangers do.

The slow test installs copies of the three folders into a virtual environment that sees the packages of this environment. pip
gets no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pitlane import PluginRegistry, SamplingParams

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PACKAGES = {path.name: path for path in sorted(EXAMPLES.glob("pitlane-*"))}
OFFLINE = {
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_NO_INDEX": "1",
    "PIP_QUIET": "1",
    "HF_HUB_OFFLINE": "1",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "suffix_decoding": {},
    "watermark": {"delta": 4.0},
    "json_schema": {"regex": "(ab, ){6}[a-z]{8}"},
}


def test_there_are_three_packages() -> None:
    assert {name.removeprefix("pitlane-").replace("-", "_") for name in PACKAGES} == set(SETTINGS)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_has_all_that_a_stranger_would_publish(name: str) -> None:
    project = tomllib.loads((PACKAGES[name] / "pyproject.toml").read_text())["project"]
    module = name.replace("-", "_")
    assert project["name"] == name and "pitlane" in project["dependencies"]
    assert [*project["entry-points"]] == ["pitlane"]
    ((entry, target),) = project["entry-points"]["pitlane"].items()
    assert module == f"pitlane_{entry}" and target.partition(":")[0] == module
    registry = PluginRegistry()
    plugin = registry.add(getattr(__import__(module), target.partition(":")[2]))
    readme = (PACKAGES[name] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    assert plugin.name == entry and sorted(rows) == sorted(plugin.Options.model_fields), "the README lists every option"
    assert f"pip install {name}" in readme and list((PACKAGES[name] / "tests").glob("test_*.py"))


def registry() -> PluginRegistry:
    from pitlane_suffix_decoding import SuffixDecoding
    from pitlane_watermark import Watermark

    JsonSchema = pytest.importorskip("pitlane_json_schema").JsonSchema
    pytest.importorskip("llguidance")
    registry = PluginRegistry.load()
    for plugin in (JsonSchema, SuffixDecoding, Watermark):
        registry.add(plugin)
    return registry


@pytest.mark.usefixtures("always_draft")
def test_the_three_compose(make_engine: Any) -> None:
    """Steering plugins change the answer together, and the drafter changes no token, also of a remembered answer."""
    engine = make_engine(registry=registry())

    def answer(*names: str) -> Any:
        sampling = SamplingParams(max_tokens=60, temperature=0.9, seed=3)
        return engine.generate([1, 2, 3], sampling, plan=engine.plan({name: SETTINGS[name] for name in names}))

    plain = answer("watermark", "json_schema")
    first, second = (answer("watermark", "json_schema", "suffix_decoding") for _ in range(2))
    assert first.token_ids == second.token_ids == plain.token_ids
    assert re.fullmatch("(ab, ){6}[a-z]{8}", plain.text) and plain.text != answer("json_schema").text
    assert second.stats["accepted_tokens"] > first.stats["accepted_tokens"] > 0


SCRIPT = """
import json, re
from pitlane import Engine, PluginRegistry, SamplingParams
settings = json.loads({settings!r})
with Engine("random:tiny", dtype="float64", plugins={{}}, registry=PluginRegistry.load()) as engine:
    sampling = SamplingParams(max_tokens=50, temperature=0.9, seed=1, ignore_eos=True)
    core, plan = engine.plan({{}}), lambda name: engine.plan({{name: settings[name]}})
    alone = {{name: engine.generate([1, 2, 3], sampling, plan=plan(name)).token_ids for name in settings}}
    free = engine.generate([1, 2, 3], sampling, plan=core).token_ids
    for name in settings:  # on and off at the same time, in both orders
        for order in (0, 1):
            plans = [plan(name), core][:: 1 - 2 * order]
            streams = [engine.submit([1, 2, 3], sampling, plan=each) for each in plans]
            on, off = [stream.result() for stream in streams][:: 1 - 2 * order]
            assert on.token_ids == alone[name] and off.token_ids == free, name
            assert [*on.stats["plugins"]] == [name] and not off.stats["plugins"] and on.stats["failed"] == {{}}
print(json.dumps({{name: alone[name] == free for name in settings}}))
"""


@dataclass
class Environment:
    """A virtual environment of its own."""

    folder: Path

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PITLANE_", "PYTHON"))}
        environment = kept | OFFLINE | {"PITLANE_LOAD": ",".join(PACKAGES), "PITLANE_HOME": str(self.folder / "home")}
        environment |= {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        python = self.folder / "venv" / "bin" / "python"
        return subprocess.run(
            [str(python), *command],
            cwd=cwd or self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def pitlane(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", "from pitlane.ui.cli import main; main()", *arguments)

    def plugins(self) -> dict[str, dict[str, Any]]:
        run = self.pitlane("plugins", "list", "--json")
        assert run.returncode == 0, run.stderr
        return {row["name"]: row for row in json.loads(run.stdout)}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return Environment(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_install_discover_check_toggle_uninstall(environment: Environment) -> None:
    pytest.importorskip("llguidance")
    assert not environment.plugins().keys() & SETTINGS.keys()
    for name, folder in PACKAGES.items():
        copy = shutil.copytree(
            folder, environment.folder / name, ignore=shutil.ignore_patterns("*.egg-info", "build", ".*")
        )
        run = environment.run("-m", "pip", "install", str(copy))
        assert run.returncode == 0, run.stdout + run.stderr
        shutil.rmtree(copy / "src")  # from here on, the installed module serves
        (copy / "pyproject.toml").unlink()
    found = environment.plugins()
    for name in SETTINGS:
        assert found[name]["status"] == "ok" and found[name]["source"] == f"pitlane-{name.replace('_', '-')} 0.1.0"
        check = environment.pitlane("plugins", "check", name, "--tokens", "24")
        assert check.returncode == 0, check.stdout + check.stderr
        tests = environment.run(
            "-m",
            "pytest",
            "-q",
            "tests",
            "-k",
            "not promise",
            cwd=environment.folder / f"pitlane-{name.replace('_', '-')}",
        )
        assert tests.returncode == 0, tests.stdout + tests.stderr

    toggled = environment.run("-c", SCRIPT.format(settings=json.dumps(SETTINGS)))
    assert toggled.returncode == 0, toggled.stderr
    assert json.loads(toggled.stdout) == {"suffix_decoding": True, "watermark": False, "json_schema": False}
    run = environment.run(
        "-c", "from pitlane_watermark import main; raise SystemExit(main())", str(EXAMPLES / "repeat_last.py")
    )
    assert run.returncode == 1 and "shows no watermark" in run.stdout, run.stderr

    removed = environment.run("-m", "pip", "uninstall", "-y", *PACKAGES)
    assert removed.returncode == 0, removed.stdout + removed.stderr
    assert not environment.plugins().keys() & SETTINGS.keys()
    refused = environment.pitlane("run", "--model", "random:tiny", "--plugins", "+watermark", "a")
    assert refused.returncode == 2 and "unknown plugin 'watermark'" in refused.stderr


def test_the_packages_are_not_installed_here() -> None:
    """Else the slow test would show nothing. Its environment sees the packages of this environment."""
    assert not any(Path(path, "pitlane_watermark.py").exists() for path in sys.path if "site-packages" in path)
