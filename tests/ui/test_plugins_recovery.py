"""Commands that help when a plugin breaks: they load no plugin. A list of plugins imports none, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NUM_PLUGINS = 20
GOOD = '''"""Good plugin {number}."""
import sys
sys.modules["imported_{number}"] = sys
from pitlane import Plugin, hookimpl


class Good(Plugin):
    name, exactness = "good_{number}", "identical"

    @hookimpl
    def step_finished(self, stats):
        pass
'''
EXITS = "import os\nos._exit(7)\n"


def install(site: Path, name: str, text: str) -> None:
    """A distribution with one plugin module, as pip leaves it in a folder."""
    module = name.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pitlane]\n{module} = {module}\n")
    (site / f"{module}.py").write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with 20 installed plugin packages."""
    for number in range(NUM_PLUGINS):
        install(tmp_path / "site", f"pitlane-good-{number}", GOOD.format(number=number))
    return tmp_path / "site"


def run(site: Path, own_home: Path, *args: str) -> tuple[Any, set[str], float]:
    """Run a command. Returns its result, the modules that it imported, and its seconds of CPU time."""
    code = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))\n"
        "atexit.register(lambda: print('SECONDS', sum(os.times()[:2]), file=sys.stderr))\n"
        "from pitlane.ui.cli import main\nmain()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PITLANE_LOAD"}
    environment |= {"PYTHONPATH": str(site), "PITLANE_HOME": str(own_home)}
    result = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, check=False
    )
    lines = {line.split()[0]: line.split()[1:] for line in result.stderr.splitlines() if line}
    return result, set(lines.get("MODULES", [])), float(lines.get("SECONDS", ["inf"])[0])


def test_a_list_is_kept_and_then_imports_no_plugin(site: Path, own_home: Path) -> None:
    first, modules, _ = run(site, own_home, "plugins", "list", "--json")
    again, kept_modules, _ = run(site, own_home, "plugins", "list", "--json")
    rows = {row["name"]: row for row in json.loads(first.stdout)}
    assert rows["good_3"]["status"] == "ok" and rows["good_3"]["source"] == "pitlane-good-3 1.0"
    assert json.loads(again.stdout) == json.loads(first.stdout) and len(rows) >= NUM_PLUGINS + 19
    assert "imported_3" in modules and "torch" not in modules
    assert not kept_modules & {"imported_3", "pitlane_good_3", "torch", "pydantic", "pluggy"}
    (site / "pitlane_good_3.py").write_text(GOOD.format(number=3).replace("Good plugin 3", "Better plugin"))
    assert "Better plugin" in run(site, own_home, "plugins", "list", "--json")[0].stdout, "the kept list is stale"


def test_a_plugin_that_ends_the_process_is_disabled_without_being_loaded(site: Path, own_home: Path) -> None:
    install(site, "pitlane-exits", EXITS)
    assert run(site, own_home, "plugins", "list")[0].returncode == 7
    disabled, modules, _ = run(site, own_home, "plugins", "disable", "pitlane-exits")
    assert disabled.returncode == 0 and "imported_3" not in modules
    assert disabled.stdout == "disabled pitlane-exits; to load it again: pitlane plugins enable pitlane-exits\n"
    listed = run(site, own_home, "plugins", "list", "--json")[0]
    row = next(row for row in json.loads(listed.stdout) if row["name"] == "pitlane_exits")
    assert row["status"] == "disabled" and "pitlane plugins enable pitlane-exits" in row["reason"]
    assert run(site, own_home, "plugins", "enable", "pitlane-exits")[0].stdout == "enabled pitlane-exits\n"
    assert run(site, own_home, "plugins", "list")[0].returncode == 7


def test_a_name_that_cannot_be_disabled_is_refused(site: Path, own_home: Path) -> None:
    unknown, modules, _ = run(site, own_home, "plugins", "disable", "pitlane-exit")
    assert unknown.returncode == 2 and "imported_3" not in modules
    assert "no package or file has a plugin 'pitlane-exit'; known: " in unknown.stderr
    assert ", pitlane_good_3, " in unknown.stderr
    built_in = run(site, own_home, "plugins", "disable", "prefix_cache")[0]
    assert built_in.returncode == 2 and "prefix_cache is built-in and cannot be disabled" in built_in.stderr
    assert not (own_home / "disabled-plugins.txt").exists()


def test_the_name_of_a_class_disables_it(site: Path, own_home: Path) -> None:
    disabled, modules, _ = run(site, own_home, "plugins", "disable", "good_3")
    assert disabled.returncode == 0 and "imported_3" not in modules
    listed, modules, _ = run(site, own_home, "plugins", "list", "--json")
    statuses = {row["source"]: row["status"] for row in json.loads(listed.stdout)}
    assert statuses["pitlane-good-3 1.0"] == "disabled" and statuses["pitlane-good-4 1.0"] == "ok"
    assert "imported_3" not in modules, "all classes of the module are disabled"


@pytest.mark.slow
def test_commands_take_less_than_half_a_second_with_20_plugins(site: Path, own_home: Path) -> None:
    """CPU time of the command, so that other processes of the machine do not count. Best of three."""
    for args in (("--help",), ("plugins", "list"), ("docs", "list")):
        runs = [run(site, own_home, *args) for _ in range(4)][1:]  # the first run keeps the list
        assert all("torch" not in modules and "imported_3" not in modules for _, modules, _ in runs), args
        assert min(seconds for _, _, seconds in runs) < 0.5, args


@pytest.mark.parametrize("args", [("--help",), ("docs", "list")], ids=" ".join)
def test_help_and_documents_import_no_plugin_and_no_torch(site: Path, own_home: Path, args: tuple[str, ...]) -> None:
    result, modules, _ = run(site, own_home, *args)
    assert result.returncode == 0 and not modules & {"imported_3", "pitlane_good_3", "torch", "pydantic"}
