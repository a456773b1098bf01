"""The page in a real Chromium: upload, ask, stream, toggle, ask again, reload; no request leaves this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TIMEOUT = 60_000  # milliseconds for whatever a test waits for, also on a busy machine
TEXT = "The track opens at 9:40. A session costs 18 euros. The lap record is 48.213 seconds."


# A process of its own: Gradio and uvicorn leave loops and sockets to the collector. Answers never end by themselves, so
# that there is something to watch and to stop.
SERVER = """
import ipaddress, os, socket, sys, time
connect = socket.socket.connect

def local_connect(self, address):  # nothing leaves this machine, and an attempt is written down
    if self.family != socket.AF_UNIX and not ipaddress.ip_address(socket.gethostbyname(address[0])).is_loopback:
        with open(os.path.join(os.environ["PITLANE_HOME"], "connections.txt"), "a") as file:
            print(address, file=file)
        raise OSError("the network is blocked")
    return connect(self, address)

socket.socket.connect = local_connect
from pitlane.engine.run.scheduler import Scheduler
from pitlane.storage.db import Store
from pitlane.ui.app import free_port, serve
from pitlane.ui.model_switch import ModelSwitch
from pitlane.ui.page_server import PageServer
from pitlane.ui.session import EngineOptions
schedule, pause, steps = Scheduler.schedule, float(sys.argv[2]), sys.argv[3]

def slow_schedule(scheduler):
    if steps:
        with open(steps, "a") as file:
            print(time.time(), file=file)
    time.sleep(pause)
    return schedule(scheduler)

Scheduler.schedule = slow_schedule
options = EngineOptions(model=sys.argv[1], dtype="float32", plugins="prefix_cache")
with (
    Store() as store,
    PageServer("127.0.0.1", free_port("127.0.0.1", 0)) as server,
    ModelSwitch(options, options.build()) as switch,
):
    switch.engine.loader.eos_token_ids = frozenset()
    serve(switch, store, server)
    print(server.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def served(
    home: Path,
    model: str = "",
    pause: float = 0.0,
    processes: list[subprocess.Popen[str]] | None = None,
    steps: Path | None = None,
) -> Iterator[str]:
    """The address of a page in its own process: the named model, else the bundled model where it is, else a tiny one.

    pause: seconds before each step, so that a long answer lasts on any machine. processes: gets the process.
    steps: a file that gets the time at which each step begins, in seconds since 1970.
    """
    bundled = (files("pitlane.storage.bundled") / "model.safetensors").is_file()
    command = [
        sys.executable,
        "-c",
        SERVER,
        model or ("bundled" if bundled else "random:tiny"),
        str(pause),
        str(steps or ""),
    ]
    own = {"PITLANE_HOME": str(home), "PITLANE_LOAD": "", "GRADIO_TEMP_DIR": str(home / "uploads")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own
    ) as process:
        assert process.stdout and process.stdin
        if processes is not None:
            processes.append(process)
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http"), "the page was not served"
            yield address
        finally:
            process.stdin.close()
            process.wait(20)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with served(home) as url:
        yield url


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without tabs. While it is open, `asyncio.run` fails in this thread: close it with the last test of a file."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, address: str, home: Path) -> Iterator[Any]:
    """A browser tab on the page; fails at the end if tab or server asked anything of another host, or if a script failed.

    Requests to other hosts are blocked.

    A context of its own: no cookie, storage or cache of another test.
    """
    strangers: list[str] = []
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.route(lambda url: not local(url), lambda route: route.abort())
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.on("request", lambda request: strangers.append(request.url) if not local(request.url) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".empty h2")
    page.wait_for_selector(".meter")
    yield page
    context.close()
    assert not strangers, f"requests to other hosts: {strangers}"
    assert not (home / "connections.txt").exists(), "the server connected to another machine"
    assert not problems, f"scripts failed: {problems}"


def local(url: str) -> bool:
    parts = urlparse(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def document(folder: Path) -> str:
    """The bundled sample, or a text where there is none."""
    sample = files("pitlane.storage.bundled") / "sample.pdf"
    if sample.is_file():
        return str(sample)
    path = folder / "guide.txt"
    path.write_text(TEXT * 3)
    return str(path)


def ask(tab: Any, text: str, answers: int) -> None:
    """Ask, and wait until there are so many finished answers."""
    tab.fill("#box textarea", text)
    tab.keyboard.press("Enter")
    finished(tab, answers)


def finished(tab: Any, answers: int) -> None:
    tab.wait_for_function("n => document.querySelectorAll('#thread .stats .lap').length === n", arg=answers)
    tab.wait_for_selector("#send", state="visible")


def limit(tab: Any, tokens: int) -> None:
    if not tab.get_by_label("Max tokens").first.is_visible():
        tab.click("#sampling .label-wrap")
    box = tab.get_by_label("Max tokens").first
    box.fill(str(tokens))
    box.press("Tab")


def test_upload_ask_stream_toggle_ask_again_reload(tab: Any, home: Path, tmp_path: Path) -> None:
    tab.set_input_files("#left input[type=file]", document(tmp_path))
    tab.wait_for_selector("#documents [aria-checked=true]")
    tab.wait_for_selector("#documents :text('KV saved')")

    limit(tab, 100_000)  # the browser may be slow to draw the first frame; the test stops the answer
    tab.fill("#box textarea", "What is the lap record?")
    tab.keyboard.press("Enter")
    lengths = []
    tab.wait_for_selector(".live .body")
    while tab.is_visible("#stop") and len({length for length in lengths if length}) < 3:
        lengths.append(tab.evaluate("(document.querySelector('.live .body') || {innerText: ''}).innerText.length"))
    grown = [length for length in lengths if length]
    assert len(set(grown)) >= 3 and grown == sorted(grown), f"the text did not stream: {lengths}"
    tab.eval_on_selector("#stop", "button => button.click()")
    finished(tab, 1)
    assert "from cache" in tab.inner_text("#thread .stats .line")  # the document was read before the question

    limit(tab, 40)
    tab.click("#switch-prompt_lookup input")
    tab.wait_for_selector("#plan :text('prompt_lookup')")
    ask(tab, "And when does it open?", 2)
    lines = tab.locator("#thread .stats").all_text_contents()  # also what is folded
    assert "prompt_lookup" not in lines[0] and "prompt_lookup" in lines[1]
    assert all("tok/s" in line and "TTFT" in line for line in lines)

    tab.reload()
    finished(tab, 2)
    assert "What is the lap record?" in tab.inner_text("#thread")
    assert "What is the lap record?" in tab.inner_text("#conversations")
    assert not list((home / "uploads").rglob("*.pdf"))  # read into the store, not kept to be served


def test_stop_retry_edit_rename_search_delete(tab: Any) -> None:
    limit(tab, 100_000)
    tab.fill("#box textarea", "Tell me everything")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".live .line")
    tab.eval_on_selector(
        "#stop", "button => button.click()"
    )  # at once: a click that waits for a still page comes too late
    finished(tab, 1)
    assert "stopped" in tab.inner_text("#thread .stats")

    limit(tab, 8)
    tab.click(".message.answer [data-do=retry]")
    tab.wait_for_selector(".compared")
    assert "same tokens as before as far as the shorter answer goes" in tab.inner_text(".compared")

    tab.hover(".message.user")
    tab.click(".message.user [data-do=edit]")
    tab.fill(".inline-editor", "Tell me less")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".message.user :text('Tell me less')")
    finished(tab, 1)

    tab.hover("#conversations .item[aria-current]")
    tab.click("#conversations .item[aria-current] [data-do=rename]")
    tab.fill(".inline-editor", "Everything")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#conversations :text('Everything')")
    tab.fill("#search input, #search textarea", "less")
    tab.wait_for_selector("#conversations mark")
    tab.fill("#search input, #search textarea", "")
    tab.wait_for_selector("#conversations mark", state="detached")
    tab.hover("#conversations .item[aria-current]")
    tab.click("#conversations .item[aria-current] [data-do=remove]")
    tab.click("#conversations .item[aria-current] [data-do=remove]")  # asks first
    tab.wait_for_selector(".empty h2")
    assert "Everything" not in tab.inner_text("#conversations")


@pytest.mark.slow
def test_tabs_keep_their_own_plugins(tab: Any, address: str) -> None:
    other = tab.context.new_page()
    other.goto(address)
    other.wait_for_selector(".meter")
    tab.click("#switch-prompt_lookup input")
    tab.wait_for_selector("#plan :text('prompt_lookup')")
    limit(other, 8)
    ask(other, "Hello", 1)
    assert "prompt_lookup" not in str(other.text_content("#thread .stats"))
    assert not other.is_checked("#switch-prompt_lookup input")
    assert tab.is_checked("#switch-prompt_lookup input")


@pytest.mark.slow
def test_what_became_of_files_is_said_beside_the_button_that_adds_them(tab: Any, tmp_path: Path) -> None:
    broken, good = tmp_path / "broken.pdf", [tmp_path / f"{number}.txt" for number in range(8)]
    broken.write_bytes(b"%PDF-1.7\nnothing")
    for path in good:
        path.write_text(f"{path.name} says little. " * 4)
    tab.set_input_files("#left input[type=file]", [str(path) for path in good])
    tab.wait_for_selector("#documents :text('7.txt')")
    tab.set_input_files("#left input[type=file]", [str(broken), str(good[0])])
    tab.wait_for_selector("#notice .problem")
    assert "broken.pdf" in tab.inner_text("#notice") and "Traceback" not in tab.inner_text("body")
    assert "Already here: 0.txt" in tab.inner_text("#notice")
    notice, add = (tab.locator(name).bounding_box() for name in ("#notice .problem", "#upload"))
    assert 0 <= notice["y"] - add["y"] - add["height"] < 40
    tab.click("#notice [data-do=dismiss]")
    tab.wait_for_selector("#notice .problem", state="detached")
    tab.reload()
    tab.wait_for_function("document.querySelectorAll('#documents [aria-checked=true]').length === 8")


@pytest.mark.slow
def test_a_file_over_the_limit_is_refused_by_tab_and_server(tab: Any, address: str, tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(101 << 20)
    before = tab.locator("#documents .item").count()
    tab.set_input_files("#left input[type=file]", str(large))
    tab.wait_for_selector(".toast-body")
    assert "100" in tab.inner_text(".toast-body") or "maximum" in tab.inner_text(".toast-body").lower()
    sent = {"name": "large.txt", "mimeType": "text/plain", "buffer": bytes(101 << 20)}
    assert tab.request.post(f"{address}/gradio_api/upload", multipart={"files": sent}).status == 413
    assert tab.locator("#documents .item").count() == before


@pytest.mark.slow
def test_an_empty_question_and_an_empty_edit_leave_the_page_whole(tab: Any) -> None:
    def whole() -> bool:
        tab.wait_for_timeout(400)
        drawn = [f"#{side} :is(.item, .quiet)" for side in ("conversations", "documents")]
        drawn += ["#thread :is(.empty, .thread)", "#meter .meter", "#plan .next", "#switch-jacobi input"]
        return all(tab.locator(part).first.is_visible() for part in drawn)

    tab.keyboard.press("Enter")
    tab.click("#send")
    assert whole()
    limit(tab, 8)
    ask(tab, "Hello", 1)
    tab.hover(".message.user")
    tab.click(".message.user [data-do=edit]")
    tab.fill(".inline-editor", " ")
    tab.keyboard.press("Enter")
    assert whole() and "Hello" in tab.inner_text("#thread")
    tab.reload()
    finished(tab, 1)


def test_a_refused_question_says_why_and_how_to_go_on(tab: Any) -> None:
    limit(tab, 8)
    tab.fill("#box textarea", "word " * 9000)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".refusal button")
    assert "tokens, but the context holds" in tab.inner_text(".refusal")
    assert tab.locator(".refusal").bounding_box()["y"] < 700, "in sight below a long question"
    tab.reload()
    tab.click(".refusal :text('Edit the question')")
    tab.fill(".inline-editor", "Short")
    tab.keyboard.press("Enter")
    finished(tab, 1)
    assert tab.locator(".refusal").count() == 0 and "Short" in tab.inner_text("#conversations [aria-current]")


@pytest.mark.slow
def test_an_answer_goes_on_behind_another_conversation(tab: Any) -> None:
    limit(tab, 100_000)
    tab.fill("#box textarea", "Tell me everything twice")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".live .line")
    tab.click("#new")
    tab.wait_for_selector(".empty h2")
    tab.wait_for_selector(".live", state="detached")
    limit(tab, 8)
    ask(tab, "A second question", 1)
    assert "everything" not in tab.inner_text("#thread")
    tab.click("#conversations :text('everything twice')")
    tab.wait_for_selector(".live .line")
    tab.click("#stop")
    finished(tab, 1)
    assert "stopped" in tab.inner_text("#thread .stats")
    tab.click("#conversations :text('A second question')")
    tab.wait_for_selector("#thread :text('A second question')")
    assert tab.locator(".message").count() == 2


def test_switches_and_sampling_survive_a_reload_and_the_seed_stays_empty(tab: Any) -> None:
    limit(tab, 33)
    assert tab.get_by_label("Seed").first.input_value() == ""
    tab.click("#switch-prompt_lookup input")
    tab.wait_for_selector("#plan :text('prompt_lookup')")
    tab.click("#switch-jacobi input")
    tab.wait_for_selector("#note-jacobi :text('jacobi replaces prompt_lookup')")
    assert not tab.is_checked("#switch-prompt_lookup input")
    tab.reload()
    tab.wait_for_selector("#plan :text('jacobi')")
    assert tab.is_checked("#switch-jacobi input")
    tab.click("#sampling .label-wrap")
    assert tab.get_by_label("Max tokens").first.input_value() == "33"
    ask(tab, "Hello", 1)
    assert "seed" not in tab.inner_text("#thread .stats")
    tab.click("#thread .stats .unfold > summary")
    assert "seed" in tab.inner_text("#thread .stats") and tab.is_visible("#thread .waterfall")
