"""The pit wall, versions, continued answers, waiting questions and rendered text in a real Chromium: one browser, one server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pitlane.storage.db import Store
from tests.ui.test_browser import CHROMIUM, TIMEOUT, ask, chromium, finished, limit, served

pytestmark = pytest.mark.browser
RICH = r"""The area is $\pi r^2$, and

\[ \sum_{i=1}^n i = \frac{n(n+1)}{2} \]

```python
def area(r: float) -> float:
    return 3.14159 * r**2  # close
```

| a | b |
|---|---|
| 1 | 2 |

- [x] done
- [ ] to do

שלום עולם, the code of $\nonsense{$ stays.
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One tab for all tests of this file; fails at the end if a script failed."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    problems: list[str] = []
    home = tmp_path_factory.mktemp("pit")
    with Store(home / "pitlane.db") as store:
        key = store.conversations.create("m").id
        store.conversations.append(key, "user", "A rich answer")
        store.conversations.append(key, "assistant", RICH)
    with served(home, pause=0.02) as url, chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".meter")
        yield page
    assert not problems, f"scripts failed: {problems}"


@pytest.mark.slow
def test_the_advice_the_drafters_and_a_reset(tab: Any) -> None:
    tab.click("#advice [data-do=switch_on]")
    tab.wait_for_selector("#plan :text('int8')")
    tab.wait_for_selector("#advice :text('Measure it')")
    tab.click("#switch-int8 input")
    tab.wait_for_selector("#advice :text('Turn on')")
    assert tab.is_checked("#switch-no-drafter input")
    tab.click("#switch-jacobi input")
    tab.wait_for_selector("#plan :text('jacobi')")
    tab.wait_for_function("!document.querySelector('#switch-no-drafter input').checked")
    tab.click("#card-jacobi .label-wrap")
    number = tab.locator("#card-jacobi input[type=number]")
    number.fill("9")
    number.press("Tab")
    tab.wait_for_function("() => sessionStorage.getItem('pitlane-tab').includes('jacobi.window')")
    tab.click("#card-jacobi .reset")
    tab.wait_for_function("() => document.querySelector('#card-jacobi input[type=number]').value === '6'")
    tab.click("#switch-no-drafter input")
    tab.wait_for_function("!document.querySelector('#switch-jacobi input').checked")
    tab.locator("#others").scroll_into_view_if_needed()
    box, header = tab.locator("#plan .next").bounding_box(), tab.locator("header").bounding_box()
    assert 0 <= box["y"] - header["height"] < 40, "the next answer stays in sight"


@pytest.mark.slow  # test_page_conversations.py has the same without a browser
def test_versions_a_continued_answer_and_a_question_that_waits(tab: Any) -> None:
    limit(tab, 12)
    ask(tab, "Tell me", 1)
    tab.click(".message.answer [data-do=go_on]")
    tab.wait_for_selector("#thread :text('continued after')", state="attached")
    finished(tab, 1)
    tab.click(".message.answer [data-do=retry]")
    tab.wait_for_selector(".versions :text('2/2')")
    tab.click(".versions [title='Earlier version']")
    tab.wait_for_selector(".versions :text('1/2')")
    tab.reload()
    finished(tab, 1)
    assert "1/2" in tab.inner_text(".versions")

    limit(tab, 100_000)
    tab.fill("#box textarea", "Tell me everything")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".live .line")
    limit(tab, 8)
    for text in ("Second", "Third"):
        tab.fill("#box textarea", text)
        tab.press("#box textarea", "Enter")
        tab.wait_for_selector(f"#queue :text('{text}')")
    tab.click("#queue .waiting:last-child [data-do=take_back]")
    tab.wait_for_function("() => document.querySelector('#box textarea').value === 'Third'")
    tab.click("#stop")
    tab.wait_for_selector("#thread :text('Second')")
    finished(tab, 3)
    assert tab.locator("#queue .waiting").count() == 0 and tab.locator(".message.user").count() == 3


def test_formulas_code_and_copy_without_a_network(tab: Any) -> None:
    tab.click("#conversations :text('A rich answer')")
    tab.wait_for_selector("#thread .math math mfrac")
    assert tab.locator("#thread .math math").count() == 2 and tab.locator("#thread .code .k").count() > 0
    assert tab.inner_text("#thread .math code") == r"\nonsense{", "what KaTeX refuses stays as it is"
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click("#thread .code [data-do=copy]")
    tab.wait_for_selector("#thread .code .done")
    assert tab.evaluate("navigator.clipboard.readText()").startswith("def area(r: float)")
    assert tab.eval_on_selector("#thread p[dir=auto]:has-text('שלום')", "p => getComputedStyle(p).direction") == "rtl"


def test_presets_shortcuts_and_an_export(tab: Any) -> None:
    with tab.expect_download() as download:
        tab.hover("#conversations .item[aria-current]")
        tab.click("#conversations .item[aria-current] a:text('md')")
    assert download.value.suggested_filename == "a-rich-answer.md"
    if not tab.is_visible("#presets"):
        tab.click("#sampling .label-wrap")
    tab.click("#presets :text('Creative')")
    tab.wait_for_function("() => sessionStorage.getItem('pitlane-tab').includes('min_p')")
    assert tab.get_by_label("Min-p").input_value() == "0.05"
    tab.click("#presets :text('Precise')")
    tab.wait_for_function("() => !sessionStorage.getItem('pitlane-tab').includes('min_p')")
    assert [tab.get_by_label(name).first.input_value() for name in ("Temperature", "Min-p")] == ["0", ""]
    tab.click("#presets :text('Reset')")
    tab.wait_for_function("() => !sessionStorage.getItem('pitlane-tab').includes('temperature')")
    tab.click("header h1")
    tab.keyboard.press("?")
    tab.wait_for_selector(".shortcuts[open]")
    tab.keyboard.press("Escape")
    tab.keyboard.press("Alt+n")
    tab.wait_for_selector(".empty h2")
    tab.click("header h1")
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.closest('#box') !== null")
