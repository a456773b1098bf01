"""How the page behaves in a real Chromium beside its answers: long lists, hover, touch, keyboard, accessibility."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pitlane.storage.db import Store
from pitlane.storage.types import Document, Page
from tests.ui.test_browser import CHROMIUM, TIMEOUT, chromium, served

pytestmark = pytest.mark.browser
DESK, PHONE = (1440, 900), (390, 844)
TARGET = 40  # pixels; what a finger hits
Open = Callable[..., Any]


def fill(home: Path, number: int) -> None:
    """Have so many conversations and documents; the first of each list is the newest."""
    with Store(home / "pitlane.db") as store:
        for index in range(len(store.conversations.list(limit=1000)), number):
            key = store.conversations.create("m").id
            store.conversations.append(key, "user", f"Question {index} about the opening hours of the track in winter")
            store.conversations.append(key, "assistant", f"Answer {index}")
        for index in range(len(store.documents.list()), number):
            title = f"Minutes-of-the-annual-meeting-of-the-karting-club-{index}.pdf"
            digest = hashlib.sha256(title.encode()).hexdigest()
            store.documents.add(Document(title, "application/pdf", (Page(0, "1", "Open."),), digest))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("look")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    fill(home, 15)
    with served(home) as url:
        yield url


@pytest.fixture(scope="module")
def open_page(address: str) -> Iterator[Open]:
    """`open_page((width, height), **context options)`: a new tab on the page."""
    with chromium() as browser:

        def make(size: tuple[int, int], **options: Any) -> Any:
            viewport = {"width": size[0], "height": size[1]}
            page = browser.new_context(viewport=viewport, **options).new_page()
            page.set_default_timeout(TIMEOUT)
            page.goto(address)
            page.wait_for_selector(".meter")
            return page

        yield make


def at_rest(tab: Any, script: str, argument: Any) -> Any:
    """The value of a script once it stays the same for a fifth of a second: the page is drawn, and nothing moves."""
    value, before = tab.evaluate(script, argument), None
    while value != before:
        tab.wait_for_timeout(200)
        value, before = tab.evaluate(script, argument), value
    return value


def show(tab: Any, side: str) -> None:
    """Have a side panel on screen, which on a phone takes a button."""
    if not tab.is_visible(f"#{side}"):
        tab.click(f"header [data-side={side}]")


@pytest.mark.parametrize(
    "number, size",
    [
        pytest.param(15, DESK, id="15, desk"),
        pytest.param(15, PHONE, id="15, phone", marks=pytest.mark.slow),
        pytest.param(100, DESK, id="100, desk", marks=pytest.mark.slow),
        pytest.param(100, PHONE, id="100, phone", marks=pytest.mark.slow),
    ],
)
def test_every_conversation_and_document_can_be_clicked(
    open_page: Open, home: Path, number: int, size: tuple[int, int]
) -> None:
    fill(home, number)
    tab = open_page(size)
    show(tab, "left")
    marks = tab.locator("#documents .attach")
    tab.wait_for_function("number => document.querySelectorAll('#documents .attach').length >= number", arg=number)
    marks.last.click(trial=True)
    marks.first.click()
    tab.wait_for_selector("#documents [aria-checked=true]")
    last = tab.locator("#conversations .open").last
    index = last.inner_text().split()[1]
    last.click()
    tab.wait_for_selector(f"#thread :text-is('Answer {index}')")
    tab.context.close()


@pytest.mark.slow
def test_hover_changes_no_line_of_a_list(open_page: Open) -> None:
    tab = open_page(DESK)
    for item in ("#conversations .item", "#documents .item"):
        boxes = """item => [...document.querySelectorAll(item + ' button:first-child')]
            .map(button => JSON.stringify(button.getBoundingClientRect()))"""
        before = at_rest(tab, boxes, item)
        tab.locator(item).first.hover()
        tool = tab.locator(f"{item} .tool").first
        tab.wait_for_function(
            "tool => getComputedStyle(tool.closest('.tools')).opacity === '1'", arg=tool.element_handle()
        )
        assert at_rest(tab, boxes, item) == before
    tab.context.close()


def test_a_finger_can_edit_rename_and_hit_every_target(open_page: Open) -> None:
    tab = open_page(PHONE, has_touch=True, is_mobile=True)
    show(tab, "left")
    tab.locator("#conversations [data-do=rename]").first.tap()
    tab.fill(".inline-editor", "Another title")
    tab.tap(".editor .save")
    tab.wait_for_selector("#conversations :text('Another title')")
    assert small_targets(tab) == []
    tab.locator("#conversations .open").first.tap()
    tab.wait_for_selector(".message.user .tools")
    shown = tab.eval_on_selector_all(".message .tools", "all => all.map(tools => getComputedStyle(tools).opacity)")
    assert shown and set(shown) == {"1"}
    tab.tap(".message.user [data-do=edit]")
    tab.fill(".inline-editor", "Never mind")
    assert small_targets(tab) == []
    tab.tap(".editor .cancel")
    assert tab.locator(".editor").count() == 0 and "Never mind" not in tab.inner_text("#thread")
    show(tab, "right")
    tab.tap("#card-prefix_cache .label-wrap")
    tab.tap("#sampling .label-wrap")
    assert small_targets(tab) == []
    tab.tap("#middle", position={"x": 20, "y": 300})
    tab.tap(".message.user [data-do=edit]")
    tab.fill(".inline-editor", "Another question")
    tab.tap(".editor .save")
    tab.wait_for_selector(".message.user :text('Another question')")
    tab.context.close()


def small_targets(tab: Any) -> list[str]:
    """What is on screen to be tapped, and smaller than a finger; a label counts for what it labels, sliders have a field."""
    return at_rest(  # type: ignore[no-any-return]
        tab,
        """least => [...document.querySelectorAll('button, input, textarea, [role=checkbox], a[href], summary')]
            .filter(e => e.checkVisibility() && e.type !== 'file')
            .map(e => [e, (e.closest('label') || e).getBoundingClientRect()])
            .filter(([e, box]) => box.height > 0 && (box.height < least || box.width < least))
            .map(([e, box]) => `${e.outerHTML.slice(0, 160)} ${box.width} x ${box.height}`)""",
        TARGET,
    )


def serious_problems(tab: Any) -> list[str]:
    """What axe-core calls serious or critical on the page as it is drawn now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    at_rest(tab, "() => document.body.innerHTML.length", None)
    violations = axe.run(tab).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in violations
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(
    "scheme, size",
    [
        pytest.param("light", DESK, id="light, desk"),
        pytest.param("dark", PHONE, id="dark, phone", marks=pytest.mark.slow),
        pytest.param("dark", DESK, id="dark, desk", marks=pytest.mark.slow),
        pytest.param("light", PHONE, id="light, phone", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious_on_any_view(open_page: Open, scheme: str, size: tuple[int, int]) -> None:
    tab = open_page(size, color_scheme=scheme)
    assert serious_problems(tab) == []
    tab.click(".empty [data-do=compare]")
    tab.wait_for_selector("#compare-view textarea")
    assert serious_problems(tab) == []
    tab.click("[data-do=compare_close]")
    show(tab, "left")
    tab.locator("#conversations .open").first.click()
    tab.wait_for_selector(".message.answer")
    show(tab, "right")
    for part in ("#sampling .label-wrap", "#card-prefix_cache .label-wrap", "#card-prefix_cache .about summary"):
        tab.click(part)
    assert serious_problems(tab) == []
    tab.click("header .model")
    tab.wait_for_selector(".model-choice")
    assert serious_problems(tab) == []
    tab.evaluate("document.querySelector('#middle').append(document.createElement('button'))")
    assert [problem.partition(":")[0] for problem in serious_problems(tab)] == ["button-name"], "axe is at work"
    tab.context.close()


def test_the_tab_key_reaches_every_control(open_page: Open) -> None:
    tab = open_page(DESK)
    tab.locator("#conversations .open").first.click()
    tab.wait_for_selector(".message.answer")
    tab.click("#card-prefix_cache .label-wrap")
    tab.focus("header .model")
    tab.evaluate("""() => {
        window.visited = new Set();
        addEventListener('focusin', event => window.visited.add(event.target));
    }""")
    controls = "button, input:not([type=file]), textarea, select, a[href], summary, [role=checkbox]"
    number = tab.locator(controls).count()
    for _ in range(2 * number):
        tab.keyboard.press("Tab")
    missed = tab.evaluate(
        """controls => [...document.querySelectorAll(controls)]
            .filter(e => e.checkVisibility() && !e.disabled && !window.visited.has(e)).map(e => e.outerHTML.slice(0, 160))""",
        controls,
    )
    assert number > 60 and missed == []
    tab.context.close()


def test_a_switch_shows_that_it_has_the_focus(open_page: Open) -> None:
    tab = open_page(DESK)
    tab.focus("#switch-jacobi input")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Shift+Tab")
    assert tab.evaluate("document.activeElement.type") == "checkbox"
    ring = tab.evaluate("(style => [style.outlineStyle, style.outlineWidth])(getComputedStyle(document.activeElement))")
    assert ring == ["solid", "2px"]
    tab.context.close()


@pytest.mark.slow  # its cancel races with a run that may end first
def test_plans_are_compared_cancelled_and_read_on_any_width(open_page: Open) -> None:
    tab = open_page(DESK)
    tab.click("#sampling button.label-wrap")
    tab.get_by_label("Max tokens").fill("4")
    tab.keyboard.press("Tab")
    tab.click("#documents .attach >> nth=0")  # of one word, so that laps are short
    tab.click(".empty :text('Ask about') >> xpath=.. >> css=[data-do=compare]")
    tab.wait_for_selector("#compare-view textarea")
    assert not tab.is_visible("#box")
    tab.fill("#compare-view textarea", "Say it again: one two three")
    tab.check("#compare-view input[value='+prompt_lookup']")
    tab.click("[data-do=compare_run]")
    tab.click("[data-do=compare_stop]")
    tab.wait_for_selector("#compare-view :text('Cancelled')")
    assert tab.is_checked("#compare-view input[value='+prompt_lookup']"), "the marks stay"
    tab.uncheck("#compare-view input[value='core']")
    tab.click("[data-do=compare_run]")
    tab.wait_for_selector(".laps-table", timeout=60_000)
    assert tab.locator(".laps-table tbody tr").count() == 2 and not tab.is_visible(".running")
    with tab.expect_download() as download:
        tab.click(".exports a >> text=CSV")
    assert download.value.suggested_filename.endswith(".csv")
    for width, height in (DESK, PHONE):
        tab.set_viewport_size({"width": width, "height": height})
        wider = "view => view.scrollWidth - view.clientWidth"
        assert tab.eval_on_selector("#compare", wider) == 0, "nothing is cut off at the side"
    tab.click("[data-do=compare_close]")
    tab.wait_for_selector("#box", state="visible")
    tab.context.close()
