"""A plugin package that is updated or removed while an engine runs: requests keep the loaded code, a restart takes the new code."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pitlane import PluginFailed, PluginRegistry, SamplingParams, UnknownPlugin, __version__
from pitlane.storage import certificates
from pitlane.ui.catalogue import certificate, code_hash, outdated_check
from pitlane.ui.cli import main

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
MODULE = '''"""Stamp: answers of one token."""
from pitlane import Plugin, hookimpl

class Stamp(Plugin):
    name, exactness = "stamp", "{exactness}"

    @hookimpl
    def adjust_logits(self, rows):
        {first}
        logits = rows.logits.clone().fill_(float("-inf"))
        logits[:, {token}] = 0.0
        return {result}
'''


class Site:
    """A folder of installed packages, with one version of `pitlane-stamp`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, version: str, token: int, exactness: str = "steering", first: str = "") -> None:
        self.uninstall()
        info = self.folder / f"pitlane_stamp-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pitlane-stamp\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[pitlane]\nstamp = pitlane_stamp:Stamp\n")
        result = "logits" if exactness == "steering" else "None"
        text = MODULE.format(exactness=exactness, first=first or "pass", token=token, result=result)
        (self.folder / "pitlane_stamp.py").write_text(text)
        (self.folder / "pitlane_stamp_tables.py").write_text("")
        importlib.invalidate_caches()

    def uninstall(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        importlib.invalidate_caches()

    def restart(self) -> PluginRegistry:
        """The plugins that a new process would load."""
        for name in ("pitlane_stamp", "pitlane_stamp_tables"):
            sys.modules.pop(name, None)
        return PluginRegistry.load()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("PITLANE_LOAD", "pitlane-stamp")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions of a file may have one time
    monkeypatch.syspath_prepend(tmp_path / "site")
    site = Site(tmp_path / "site")
    yield site
    for name in ("pitlane_stamp", "pitlane_stamp_tables"):
        sys.modules.pop(name, None)


def answer(engine: Any) -> Any:
    return engine.generate([1, 2, 3], GREEDY, plan=engine.plan({"stamp": {}}))


def test_an_update_serves_after_a_restart(site: Site, make_engine: Any) -> None:
    site.install("1.0", token=7)
    running = make_engine(registry=site.restart())
    assert answer(running).token_ids == [7] * 6
    site.install("2.0", token=9)
    assert answer(running).token_ids == [7] * 6, "the next request runs the code that was loaded"
    assert running.registry.entries["stamp"].source == "pitlane-stamp 1.0"
    restarted = make_engine(registry=site.restart())
    assert answer(restarted).token_ids == [9] * 6
    assert restarted.registry.entries["stamp"].source == "pitlane-stamp 2.0"


def test_a_removed_package_serves_until_the_restart(site: Site, make_engine: Any) -> None:
    site.install("1.0", token=7)
    running = make_engine(registry=site.restart())
    site.uninstall()
    assert answer(running).token_ids == [7] * 6, "a first plan, made after the package was removed"
    restarted = make_engine(registry=site.restart())
    with pytest.raises(UnknownPlugin, match="unknown plugin 'stamp'; known: "):
        restarted.plan({"stamp": {}})
    refused = CliRunner().invoke(main, ["run", "--model", "random:tiny", "--plugins", "+stamp", "Hello"])
    assert refused.exit_code == 2 and "unknown plugin 'stamp'" in refused.stderr


def test_a_module_that_is_missing_after_a_removal_is_named(site: Site, make_engine: Any) -> None:
    """A plugin that imports a part of its package in a hook."""
    way_out = (
        "No module named 'pitlane_stamp_tables'; install it, or restart Pitlane if the plugin's package was updated"
    )
    for exactness in ("steering", "identical"):
        site.install("1.0", 7, exactness, first="import pitlane_stamp_tables")
        running = make_engine(registry=site.restart())
        site.uninstall()
        if exactness == "steering":
            with pytest.raises(PluginFailed, match=way_out):
                answer(running)
        else:
            result = answer(running)
            assert way_out in result.stats["failed"]["stamp"]
            assert result.token_ids == running.generate([1, 2, 3], GREEDY).token_ids


def test_a_certificate_is_of_the_loaded_code(site: Site) -> None:
    site.install("1.0", token=7)
    plugin = site.restart().get("stamp")
    checked = code_hash(plugin)
    record = {"source": "pitlane-stamp 1.0", "pitlane": __version__, "code": checked}
    certificates.save("stamp", record)
    assert certificate("stamp", "pitlane-stamp 1.0", code_hash(plugin)) is not None
    site.install("1.0", token=9)  # the code of another state of the version
    assert code_hash(plugin) == checked, "the running process has the old code, and its certificate"
    new = site.restart().get("stamp")
    assert certificate("stamp", "pitlane-stamp 1.0", code_hash(new)) is None
    assert outdated_check("stamp", "pitlane-stamp 1.0", code_hash(new)) == "since its code changed"
    site.install("2.0", token=9)
    updated = code_hash(site.restart().get("stamp"))
    assert outdated_check("stamp", "pitlane-stamp 2.0", updated) == "since the check of pitlane-stamp 1.0"
