"""A plugin whose import does more than define a class: it loads, the process stays as it was, and a note names the fault."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pitlane import PluginRegistry
from pitlane.engine.plan import import_watch
from pitlane.ui.cli import main

PLUGIN = """{first}
from pitlane import Plugin, hookimpl

class Busy(Plugin):
    name, exactness = "busy", "identical"
    {hook}
"""
HOOK = "step_finished = hookimpl(lambda self, stats: None)"
FAULTS = {
    "import torch; torch.set_default_dtype(torch.float64)": "changed torch's default dtype to torch.float64",
    "import torch; torch.set_default_device('meta')": "changed torch's default device to meta",
    "import torch; torch.set_grad_enabled(False)": "changed torch's recording of gradients to False",
    "import torch; torch.set_num_threads(torch.get_num_threads() + 3)": "changed torch's number of threads to ",
    "import os; os.chdir('/')": "changed the working directory to /",
    "import threading, time; threading.Thread(target=time.sleep, args=(0.5,), name='pump').start()": "started threads (pump)",
    "import time; time.sleep(0.2)": "took 0 s; do slow work in lane_opened",
}  # fmt: skip


def write(folder: Path, first: str, hook: str = HOOK) -> Path:
    (folder / "busy.py").write_text(PLUGIN.format(first=first, hook=hook))
    return folder


def global_settings() -> list[Any]:
    settings = [torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()]
    return [*settings, torch.get_num_threads(), os.getcwd()]


@pytest.mark.parametrize(("first", "note"), FAULTS.items(), ids=lambda text: text[:40])
def test_a_fault_of_an_import_is_noted_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first: str, note: str
) -> None:
    monkeypatch.setattr(import_watch, "SLOW_SECONDS", 0.15 if "sleep(0.2)" in first else 60.0)
    before = global_settings()
    entry = PluginRegistry.load(write(tmp_path, first)).entries["busy"]
    assert global_settings() == before
    assert entry.status == "ok" and entry.plugin is not None
    (own,) = entry.notes
    assert own.startswith(f"its import {note}")
    assert f"plugin busy ({tmp_path / 'busy.py'}): {own}" in caplog.messages
    for thread in threading.enumerate():
        if thread.name == "pump":
            thread.join()


def test_an_import_without_faults_has_no_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert PluginRegistry.load(write(tmp_path, "import torch")).entries["busy"].notes == []
    assert not caplog.messages


def test_a_long_import_is_named_while_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(import_watch, "SLOW_SECONDS", 0.01)
    with import_watch.watched("busy", "pitlane-busy 1.0") as notes:
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "the import of plugin busy (pitlane-busy 1.0) takes more than 0 s" in caplog.messages[0]
        assert "pitlane plugins disable busy" in caplog.messages[0] and notes == []
    assert notes == ["took 0 s; do slow work in lane_opened"] and caplog.records[0].levelno == logging.WARNING


def test_what_an_import_prints_does_not_reach_the_json_of_a_command(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "print('hello')"))
    result = CliRunner().invoke(main, ["plugins", "list", "--json", "--plugins-dir", folder])
    assert result.exit_code == 0 and "hello" in result.stderr
    assert "busy" in [row["name"] for row in json.loads(result.stdout)]


def test_a_plugin_without_a_hook_is_noted(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "", hook="def step_ended(self, stats): pass"))
    info = CliRunner().invoke(main, ["plugins", "info", "busy", "--plugins-dir", folder])
    assert info.exit_code == 0
    assert (
        "  note: it has no hook, so it changes nothing; write @hookimpl above the methods that are hooks" in info.stdout
    )
    table = CliRunner().invoke(main, ["plugins", "list", "--plugins-dir", folder]).stdout
    assert "(it has no hook, so it" in " ".join(table.split())
