"""The tutorial docs/tutorial.md: every block runs, in the order of the page, and the outputs are those of the page.

The slow test runs the page to the letter in a virtual environment. The default tier runs the plugin of the page, without a shell.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pitlane import Engine, PluginRegistry, SamplingParams
from tests.test_guide import Reader, comparable

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_block_runs_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    reader = Reader.settle(tmp_path, "pitlane-calm")
    reader.follow(BLOCKS)
    assert len(reader.outputs) == PAGE.count("```text\n") == 3
    for shown, real in reader.outputs:
        assert comparable(real)[-len(comparable(shown)) :] == comparable(shown)


def test_the_plugin_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    texts = {name: text for _, name, text in BLOCKS if name}
    (tmp_path / "pitlane_calm.py").write_text(texts["pitlane-calm/pitlane_calm.py"], encoding="utf-8")
    registry = PluginRegistry.load(tmp_path)
    with Engine("random:tiny", dtype="float64", plugins={}, registry=registry) as engine:
        sampling = SamplingParams(max_tokens=40, temperature=5.0, seed=1, ignore_eos=True)
        free, calm = (
            engine.generate([1], sampling, plan=engine.plan(plan)).text for plan in ({}, {"calm": {"mark": "<"}})
        )
    assert "<" in free and "<" not in calm


def test_every_file_of_the_page_is_named_in_its_text() -> None:
    assert [language for language, name, _ in BLOCKS if name] == ["python", "python"]
    assert all(f"`{name}`" in PAGE for _, name, _ in BLOCKS if name)
