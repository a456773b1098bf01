"""Take the picture of the page for README and docs: `python tests/ui/screenshot.py docs/screenshot.png [MODEL] [dark]`.

A real run: the sample is asked, a plugin is switched on, the question is asked again. Needs Chromium; not collected by pytest.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack

QUESTIONS = ("When is the track open?", "What is the speed limit in the pit lane?")
ARGUMENTS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update".split()


def take(target: str, model: str, dark: bool) -> None:
    """Serve the page over a fresh home, drive it, write a PNG of 1280 x 860 pixels."""
    from playwright.sync_api import sync_playwright

    from pitlane.storage.db import Store
    from pitlane.ui.app import free_port, serve
    from pitlane.ui.model_switch import ModelSwitch
    from pitlane.ui.page_server import PageServer
    from pitlane.ui.session import EngineOptions

    options = EngineOptions(model=model)
    with (
        Store() as store,
        PageServer("127.0.0.1", free_port("127.0.0.1", 0)) as server,
        ModelSwitch(options, options.build()) as switch,
        ExitStack() as browsers,
    ):
        serve(switch, store, server)
        playwright = browsers.enter_context(sync_playwright())  # last: its event loop runs in this thread
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="dark" if dark else "light")
        page.goto(server.url)
        page.click(f"text={QUESTIONS[0]}")
        done = "n => document.querySelectorAll('#thread .stats .lap').length === n"
        page.wait_for_function(done, arg=1)
        page.fill("#box textarea", QUESTIONS[1])
        page.keyboard.press("Enter")
        page.wait_for_function(done, arg=2)
        page.wait_for_selector("#send", state="visible")
        page.click("#switch-prompt_lookup input")
        page.wait_for_selector("#plan :text('prompt_lookup')")
        page.hover(".message.answer:last-child")
        page.click(".message.answer:last-child [data-do=retry]")
        page.wait_for_selector(".compared")
        page.mouse.move(640, 840)
        page.wait_for_timeout(500)
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    from pitlane.ui.bench.plans import own_home

    os.environ["PITLANE_LOAD"] = ""
    with own_home():  # fetched models are in it
        take(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "bundled", "dark" in sys.argv[3:])
