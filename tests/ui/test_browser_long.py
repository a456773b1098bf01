"""A thread of 500 messages in a real Chromium: time to load, time from a token to the screen, memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pitlane.storage.db import Store
from tests.ui.test_browser import TIMEOUT, chromium, finished, limit, served

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MESSAGES, ANSWERS, TOKENS = 500, 5, 60
PAUSE = 0.05  # seconds before a step: the speed of a model of 20 tokens a second
LOAD_SECONDS, P95_MS = 3.0, 150.0
HEAP_BYTES, PROCESS_BYTES = 8e6, 60e6  # growth over all answers after the first
# Times (ms since 1970) at which the page first showed so many tokens of the unfinished answer.
OBSERVE = """() => {
    window.seen = {};
    new MutationObserver(() => {
        const count = parseInt(document.querySelector('.live .line b')?.innerText);
        if (!count || count in window.seen) return;
        window.seen[count] = 0;
        requestAnimationFrame(() => { window.seen[count] = Date.now(); });
    }).observe(document.querySelector('#live'), { childList: true, subtree: true, characterData: true });
}"""


def delays(seen: dict[str, float], written: list[float]) -> list[float]:
    """Milliseconds from the end of a token's step until the page shows it. written: seconds since 1970, by token."""
    frames = sorted((int(count), shown) for count, shown in seen.items() if shown)
    times = []
    for token, moment in enumerate(written, start=1):
        shown = next((shown for count, shown in frames if count >= token), None)
        times += [shown - 1e3 * moment] if shown is not None else []
    return times


def heap(tab: Any) -> float:
    session = tab.context.new_cdp_session(tab)
    session.send("HeapProfiler.collectGarbage")
    session.detach()
    return float(tab.evaluate("performance.memory.usedJSHeapSize"))


def test_a_long_thread_loads_fast_draws_fast_and_leaks_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "pitlane.db") as store:
        key = store.conversations.create("m").id
        with store.transaction():
            for index in range(
                MESSAGES
            ):  # short, and every third question has no answer: the prompt must fit into the context
                role = "assistant" if index % 3 == 2 else "user"
                store.conversations.append(key, role, f"**{index}**")
    processes: list[subprocess.Popen[str]] = []
    steps = tmp_path / "steps.txt"
    with served(tmp_path, pause=PAUSE, processes=processes, steps=steps) as url, chromium() as browser:
        tab = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        tab.set_default_timeout(TIMEOUT)
        tab.goto(url)  # the first page of a process compiles templates
        tab.wait_for_selector(".meter")
        started = time.perf_counter()
        tab.goto(f"{url}/?again#{key}")
        tab.wait_for_function(f"() => document.querySelectorAll('#thread .message').length === {MESSAGES}")
        load_seconds = time.perf_counter() - started
        tab.evaluate(OBSERVE)
        limit(tab, TOKENS)
        sizes, slowest = [], []
        for answer in range(ANSWERS):
            steps.write_text("")
            tab.evaluate("window.seen = {}")
            tab.fill("#box textarea", "Go on")
            tab.keyboard.press("Enter")
            finished(tab, answer + 1)
            written = [float(line) for line in steps.read_text().split()]
            # A step begins where the step before has ended and given its token; the last token has no step behind it.
            times = sorted(delays(tab.evaluate("window.seen"), written[1 - TOKENS :]))
            slowest.append(times[int(0.95 * len(times))])
            sizes.append((heap(tab), psutil.Process(processes[0].pid).memory_info().rss))
        print(
            f"load {load_seconds:.2f} s, token to screen p95 {[round(ms) for ms in slowest]} ms, heap and process {sizes}"
        )
    assert load_seconds < LOAD_SECONDS
    assert min(slowest) < P95_MS
    assert sizes[-1][0] - sizes[0][0] < HEAP_BYTES and sizes[-1][1] - sizes[0][1] < PROCESS_BYTES
