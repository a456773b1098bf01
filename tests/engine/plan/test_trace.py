"""PITLANE_TRACE=1 prints every call of a hook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane import Plugin, PluginRegistry, hookimpl
from pitlane.engine.plan import trace
from pitlane.engine.plan.hooks import Hook, call
from pitlane.engine.plan.hookspecs import SPECS


class Traced(Plugin):
    name, exactness = "traced", "steering"

    @hookimpl
    def adjust_logits(self, rows: Any) -> Any:
        return rows()


def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_on: bool, rows: Any) -> list[str]:
    monkeypatch.setattr(trace, "IS_ON", is_on)
    errors: list[Exception] = []
    call([Hook.of(Traced(), SPECS["adjust_logits"])], None, errors.append, rows=rows)
    return capsys.readouterr().err.splitlines()


def failing() -> None:
    raise ValueError("no rows")


@pytest.mark.parametrize("rows, result", [
    (lambda: torch.zeros(2, 5), r"Tensor \[2, 5\]"),
    (lambda: None, "None"),
    (failing, r"ValueError\('no rows'\)"),
])  # fmt: skip
def test_a_call_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: Any, result: str
) -> None:
    (line,) = lines(monkeypatch, capsys, True, rows)
    assert re.fullmatch(rf"pitlane: traced\.adjust_logits \d+\.\d{{3}} ms -> {result}", line)
    assert lines(monkeypatch, capsys, False, rows) == []


@pytest.mark.parametrize("value, is_on", [("1", True), ("0", False), ("", False), (None, False)])
def test_the_variable_switches_it_on(value: str | None, is_on: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "PITLANE_TRACE"}
    environment |= {} if value is None else {"PITLANE_TRACE": value}
    code = f"from pitlane.engine.plan import trace; assert trace.IS_ON is {is_on}"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_plugin_is_named_before_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.py").write_text("import sys; print('imported', file=sys.stderr)")
    monkeypatch.setattr(trace, "IS_ON", True)
    PluginRegistry.load(tmp_path)
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"pitlane: importing plugin last ({tmp_path / 'last.py'})", "imported",
    ]  # fmt: skip
