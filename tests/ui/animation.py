"""Take the animated picture for README and docs: `python tests/ui/animation.py docs/toggle.webp [MODEL]`.

A real run: a question over the sample is answered, a plugin is switched on, and the same question is asked again. The figure of
tokens per second moves, and the page says that the tokens are the same. Needs Chromium; not collected by pytest.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from contextlib import ExitStack
from typing import Any

PLUGIN = "prompt_lookup"
SIZE, WIDTH = (1180, 720), 940  # of the browser, and of the picture
FRAME_SECONDS, HOLD_SECONDS = 0.12, 2.5
QUALITY, MAX_BYTES = 80, 1_500_000
MAX_FRAME_MS = 2500  # a busy machine takes few frames, and the picture would stand still
# A headless browser draws no pointer.
POINTER = """() => {
    const dot = document.createElement('div');
    dot.style = 'position:fixed;z-index:99;width:22px;height:22px;margin:-11px;border-radius:50%;pointer-events:none;' +
        'background:rgb(10 110 78 / .35);border:2px solid #0a6e4e;transition:left .25s,top .25s;left:-40px;top:-40px';
    document.body.append(dot);
    addEventListener('mousemove', event => { dot.style.left = event.clientX + 'px'; dot.style.top = event.clientY + 'px'; });
}"""
DONE = "n => document.querySelectorAll('#thread .stats .lap').length === n && !document.querySelector('.live')"


class Film:
    """Frames of a page with their times."""

    def __init__(self, page: Any) -> None:
        self.page, self.frames, self.times = page, list[bytes](), list[float]()

    def shoot(self, seconds: float = 0.0) -> None:
        """Take frames for so many seconds, at least one."""
        end = time.monotonic() + seconds
        while True:
            self.times.append(time.monotonic())
            self.frames.append(self.page.screenshot(type="png"))
            self.page.wait_for_timeout(1e3 * max(0.0, FRAME_SECONDS - (time.monotonic() - self.times[-1])))
            if time.monotonic() >= end:
                return

    def until(self, script: str, argument: Any) -> None:
        """Take frames until a script is true."""
        while not self.page.evaluate(script, argument):
            self.shoot()
        self.shoot()

    def click(self, selector: str) -> None:
        """Move the pointer to an element, and click."""
        box = self.page.locator(selector).first.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.shoot(0.4)
        self.page.click(selector)
        self.shoot(0.4)

    def write(self, target: str) -> None:
        """Write an animated WebP: equal frames become one longer frame."""
        from PIL import Image

        images, lengths = [], list[int]()
        ends = [*self.times[1:], self.times[-1] + HOLD_SECONDS]
        for index, (frame, start, end) in enumerate(zip(self.frames, self.times, ends, strict=True)):
            length = min(max(20, round(1e3 * (end - start))), MAX_FRAME_MS)
            if index and frame == self.frames[index - 1]:
                lengths[-1] = min(lengths[-1] + length, MAX_FRAME_MS)
                continue
            image = Image.open(io.BytesIO(frame)).convert("RGB")
            images.append(image.resize((WIDTH, WIDTH * image.height // image.width), Image.Resampling.LANCZOS))
            lengths.append(length)
        first, *others = images
        first.save(
            target,
            save_all=True,
            append_images=others,
            duration=lengths,
            loop=0,
            quality=QUALITY,
            method=6,
            minimize_size=True,
        )


def play(film: Film, question: str) -> None:
    """Ask, switch the plugin on, ask again."""
    page = film.page
    page.fill("#box textarea", question)
    film.shoot(0.6)
    page.keyboard.press("Enter")
    film.until(DONE, 1)
    film.shoot(1.2)
    page.eval_on_selector(f"#card-{PLUGIN}", "card => card.scrollIntoView({block: 'center'})")
    film.click(f"#switch-{PLUGIN} input")
    page.wait_for_selector(f"#plan :text('{PLUGIN}')")
    film.shoot(0.8)
    film.click(".message.answer [data-do=retry]")
    film.until("() => Boolean(document.querySelector('.compared'))", None)
    page.mouse.move(590, 600)
    film.shoot(1.0)


def take(target: str, model: str) -> None:
    """Serve the page over a fresh home, drive it, write the picture."""
    from playwright.sync_api import sync_playwright

    from pitlane.storage.db import Store
    from pitlane.ui.app import free_port, serve
    from pitlane.ui.first_screen import EXPERIMENT
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
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(server.url)
        page.click("#sample")
        page.wait_for_selector("#documents :text('KV saved')")
        page.evaluate(POINTER)
        film = Film(page)
        play(film, EXPERIMENT)
        film.write(target)
        browser.close()
    size = os.path.getsize(target)
    print(f"{target}: {size:,} bytes, {len(film.frames)} frames")
    if size > MAX_BYTES:
        sys.exit(f"the picture may have {MAX_BYTES:,} bytes; lower QUALITY or WIDTH")


if __name__ == "__main__":
    from pitlane.ui.bench.plans import own_home

    os.environ["PITLANE_LOAD"] = ""
    with own_home():  # fetched models are in it
        take(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "smollm2")
