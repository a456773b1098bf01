"""What the README shows is what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.engine.plan.registry import PluginRegistry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_plugin_is_the_one_shown_and_works(make_engine: Any) -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown and shown[1] in (ROOT / "examples" / "repeat_last.py").read_text(encoding="utf-8")
    engine = make_engine(registry=PluginRegistry.load(ROOT / "examples"))
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    drafted = engine.generate([1, 2, 3], params, plan=engine.plan({"repeat_last": {}}))
    assert drafted.token_ids == engine.generate([1, 2, 3], params).token_ids
    assert drafted.stats["draft_tokens"] > 0


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("line", re.findall(r"^pitlane .*$", README, re.MULTILINE))
def test_commands_shown_exist(line: str) -> None:
    from pitlane.ui.cli import main

    words = shlex.split(line, comments=True)[1:]
    command: Any = main
    while words and hasattr(command, "get_command") and command.get_command(None, words[0]) is not None:
        command = command.get_command(None, words.pop(0))
    known = {option for parameter in command.params for option in parameter.opts}
    assert command is not main
    assert {word for word in words if word.startswith("--")} <= known
