"""The model menu in a real Chromium: the server changes its model under an open tab."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.ui.test_browser import CHROMIUM, TIMEOUT, ask, chromium, finished, limit, served

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # a minute: models are loaded in a process of their own
BUNDLED = Path(str(files("pitlane.storage.bundled") / "config.json")).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the bundled model under names of their own."""
    if not (BUNDLED / "model.safetensors").is_file():
        pytest.skip("no bundled model here")
    parent = tmp_path_factory.mktemp("models")
    copies = parent / "alpha", parent / "beta"
    for copy in copies:
        copy.mkdir()
        for file in BUNDLED.iterdir():
            if file.suffix in (".json", ".safetensors", ".jinja"):
                shutil.copy(file, copy)
    return copies


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with served(tmp_path_factory.mktemp("model-home"), str(folders[0]), pause=0.05) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tabs(browser: Any, address: str) -> Iterator[tuple[Any, Any]]:
    """Two browser tabs on the page; fails at the end if a script failed."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    both = context.new_page(), context.new_page()
    for page in both:
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".meter")
    yield both
    context.close()
    assert not problems, f"scripts failed: {problems}"


def choose(tab: Any, name: str) -> None:
    tab.click("header .model")
    tab.wait_for_selector(".model-choice")
    tab.fill("#other-name input, #other-name textarea", name)
    tab.keyboard.press("Enter")


def serving(tab: Any, name: str) -> None:
    tab.wait_for_selector(f"header .model b:text-is('{name}')")
    tab.wait_for_selector(".meter")


def test_a_change_under_a_running_answer_keeps_the_tab_and_a_failure_keeps_the_model(
    tabs: tuple[Any, Any], address: str, folders: tuple[Path, Path]
) -> None:
    tab, other = tabs
    serving(tab, "alpha")
    limit(tab, 100_000)
    tab.fill("#box textarea", "Tell me everything")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".live .line")

    choose(tab, str(folders[1]))
    for page in tabs:
        page.wait_for_selector("header .change:has-text('beta: waits for the running answer')")
    tab.wait_for_selector("#models:not(.open)", state="attached")
    assert tab.is_visible(".live .line"), "the old model goes on"
    limit(other, 8)
    ask(other, "A question meanwhile", 1)  # answered by the old model
    serving(other, "alpha")
    tab.fill("#box textarea", "half a question")
    tab.click("#stop")

    for page in tabs:
        serving(page, "beta")
    finished(tab, 1)
    assert "Tell me everything" in tab.inner_text("#thread")
    assert tab.input_value("#box textarea") == "half a question"
    assert "A question meanwhile" in other.inner_text("#thread")
    assert tab.locator(".by").count() == 0
    limit(tab, 8)
    ask(tab, "Who answers now?", 2)
    assert tab.locator(".by").all_inner_texts() == ["alpha", "beta"]

    choose(tab, str(folders[1].parent / "gamma"))
    for page in tabs:
        page.wait_for_selector("header .failure:has-text('gamma is not loaded: no such folder')")
    serving(tab, "beta")
    tab.click("header .failure button")
    tab.click("header .model")
    tab.wait_for_selector("#models .problem:has-text('gamma is not loaded')")
    tab.keyboard.press("Escape")
    ask(tab, "And now?", 3)
    assert tab.locator(".by").all_inner_texts() == ["alpha", "beta", "beta"]


def test_a_tab_of_an_earlier_page_raises_no_event_on_the_next_page(
    tabs: tuple[Any, Any], address: str, folders: tuple[Path, Path]
) -> None:
    def join(session: str) -> int:
        body = json.dumps({"session_hash": session, "fn_index": 0, "data": []}).encode()
        request = Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
        try:
            with urlopen(request) as response:
                return int(response.status)
        except HTTPError as error:
            return error.code

    tab, _ = tabs
    name = tab.inner_text("header .model b")
    assert join("an-old-tab") != 409
    choose(tab, str(folders[name == "alpha"]))
    serving(tab, "beta" if name == "alpha" else "alpha")
    assert join("an-old-tab") == 409 and join("a-new-tab") != 409
