"""A plugin package on the page: its card has switch and options; it steers answers while it is on, and no answer after."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.ui.test_browser import TIMEOUT, ask, chromium, limit, served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_package_is_toggled_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for module in EXAMPLES.glob("pitlane-*/src/*.py"):
        shutil.copy(module, plugins)
    monkeypatch.setenv("PITLANE_PLUGINS_DIR", str(plugins))
    with served(tmp_path / "home") as address, chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(TIMEOUT)
        tab.goto(address)
        tab.wait_for_selector(".meter")
        for name in ("pitlane_suffix_decoding", "pitlane_watermark", "pitlane_json_schema"):
            assert tab.locator(f"#switch-{name.removeprefix('pitlane_')} input").count() == 1
        limit(tab, 12)
        ask(tab, "Hello", 1)
        tab.click("#card-json_schema .label-wrap")
        tab.get_by_label("Regular expression").fill("[0-9]{3}-ok")
        tab.click("#switch-json_schema input")
        tab.wait_for_selector("#plan :text('json_schema')")
        ask(tab, "Hello", 2)
        tab.click("#switch-json_schema input")
        tab.wait_for_selector("#plan :text('json_schema')", state="detached")
        ask(tab, "Hello", 3)
        free, steered, again = tab.locator("#thread .message.answer").all_text_contents()[-3:]
        assert re.search(r"\b[0-9]{3}-ok\b", steered), steered
        assert not re.search(r"[0-9]{3}-ok", free + again), free + again
