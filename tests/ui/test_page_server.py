"""The server of the page without a browser: what it does while nothing happens."""

from __future__ import annotations

import subprocess
import sys

WAKES = 120  # of the server's loop in a second; with Gradio's own intervals it wakes about 1,500 times
# A process of its own: Gradio leaves loops to the collector.
IDLE = """
import time
from pitlane.ui.app import free_port
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_server import PageServer

with gr.Blocks(analytics_enabled=False) as page:
    gr.HTML("")
with PageServer("127.0.0.1", free_port("127.0.0.1", 0)) as server:
    server.show(page)
    selector, wakes = server._loop._selector, []
    select = selector.select
    selector.select = lambda timeout=None: wakes.append(timeout) or select(timeout)
    started = time.perf_counter()
    time.sleep(1)
    print(len(wakes) / (time.perf_counter() - started))
"""


def test_an_idle_page_leaves_the_interpreter_to_the_engine() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True, timeout=60)
    assert 0 < float(done.stdout) < WAKES
