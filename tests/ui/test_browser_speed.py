"""SmolLM2 on the page beside a browser, and for a client that draws nothing, against `pitlane run` on the same prompt.

By hand, on a machine without other work: `pytest -s -m "slow or not slow" tests/ui/test_browser_speed.py`. Only ratios compare.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ui.test_browser import chromium, finished, limit

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]
MODEL = Path("models", "smollm2")
PROMPT = "Write a long story about the keeper of a lighthouse."
TOKENS, ROUNDS, SEED = 400, 5, 1
DRAWN, READ = 0.8, 0.95  # shares of the speed of `pitlane run`
READER = """
import json, sys, time
from urllib.request import urlopen
number = 0
while True:
    with urlopen(f"{sys.argv[1]}?tab=reader&number={number}") as answer:
        frame = json.load(answer)
    if frame.get("over"):
        break
    number = frame["number"]
    time.sleep(0.06)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cached = Path.home() / ".local" / "share" / "pitlane" / MODEL
    if not cached.is_dir():
        pytest.skip("SmolLM2 is not on this machine")
    folder = tmp_path_factory.mktemp("speed")
    (folder / "models").mkdir()
    (folder / MODEL).symlink_to(cached)
    return {**os.environ, "PITLANE_HOME": str(folder), "GRADIO_TEMP_DIR": str(folder / "uploads")}


@contextmanager
def page(environment: dict[str, str]) -> Iterator[str]:
    command = [
        *PITLANE,
        "ui",
        "--model",
        "smollm2",
        "--offline",
        "--no-open",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        try:
            yield next(word for word in process.stdout.readline().split() if word.startswith("http"))
        finally:
            process.terminate()


def run_alone(environment: dict[str, str]) -> float:
    """Tokens per second of `pitlane run`, while page and browser are idle."""
    command = [*PITLANE, "run", "--model", "smollm2", "--offline", "--json"]
    command += ["--max-tokens", str(TOKENS), "--seed", str(SEED), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(json.loads(done.stdout)["stats"]["tokens_per_second"])


def asked(tab: Any) -> None:
    tab.click("#new")
    tab.wait_for_selector(".empty h2")
    tab.fill("#box textarea", PROMPT)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("[data-live]")


def speed(tab: Any) -> float:
    finished(tab, 1)
    return float(tab.inner_text("#thread .stats .line").split(" tok/s")[0].split()[-1])


def read_by_a_client(tab: Any, url: str) -> float:
    """The tab asks, then draws nothing: another process reads the frames."""
    asked(tab)
    key = tab.evaluate(
        "() => { const live = document.querySelector('[data-live]'); live.remove(); return live.dataset.live }"
    )
    subprocess.run([sys.executable, "-c", READER, f"{url}/pitlane/live/{key}"], check=True)
    return speed(tab)


def test_the_page_keeps_the_speed_of_the_engine(environment: dict[str, str]) -> None:
    drawn, read = [], []
    with page(environment) as url, chromium() as browser:
        tab = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        tab.goto(url)
        tab.wait_for_selector(".meter")
        limit(tab, TOKENS)
        seed = tab.get_by_label("Seed").first
        seed.fill(str(SEED))
        seed.press("Tab")
        time.sleep(1)
        for _ in range(ROUNDS):
            alone = run_alone(environment)
            asked(tab)
            drawn.append(speed(tab) / alone)
            read.append(read_by_a_client(tab, url) / alone)
            print(f"alone {alone:.1f} tok/s, drawn {drawn[-1]:.2f}, read {read[-1]:.2f}")
    assert statistics.median(drawn) >= DRAWN
    assert statistics.median(read) >= READ
