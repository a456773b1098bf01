"""The fixtures for plugin packages: pytest finds them by the entry point, and importing them imports no engine."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

TEST = """
import os
from pitlane import Plugin, SamplingParams, hookimpl


class Bans(Plugin):
    name, exactness = "bans", "steering"

    @hookimpl
    def adjust_logits(self, rows):
        logits = rows.logits.clone()
        logits[:, :300] = float("-inf")
        return logits


def test_engine(pitlane_engine, pitlane_home):
    assert os.environ["PITLANE_HOME"] == str(pitlane_home) and os.environ["PITLANE_LOAD"] == ""
    engine = pitlane_engine(Bans)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    result = engine.generate([1, 2, 3], params, plan=engine.plan({"bans": {}}))
    assert min(result.token_ids) >= 300 and engine.default_plan.names == []


def test_registry(pitlane_registry):
    assert "bans" not in pitlane_registry.entries and "prompt_lookup" in pitlane_registry.entries
"""


def test_the_entry_point_is_light() -> None:
    (point,) = (point for point in importlib.metadata.entry_points(group="pytest11") if point.name == "pitlane")
    code = f"import sys, {point.value}; print({{'torch', 'numpy', 'pluggy._engine', 'pitlane.engine.engine'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_a_package_uses_the_fixtures_by_name(tmp_path: Path) -> None:
    (tmp_path / "test_bans.py").write_text(TEST)
    environment = os.environ | {"PITLANE_PLUGINS_DIR": "/nowhere"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in result.stdout, result.stdout
