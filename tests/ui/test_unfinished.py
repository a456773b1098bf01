"""A killed process loses no answer: what was kept of it is at its place after a restart, marked, and it can go on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.ui.ask import Ask
from pitlane.ui.panels import Live, thread_html
from pitlane.ui.sampling import Sampling
from tests.ui.test_browser import TEXT, TIMEOUT, ask, chromium, limit, served
from tests.ui.test_page import ROLES


@pytest.fixture
def talk(page: Any) -> SimpleNamespace:
    """A conversation with one answer; `keep(**ask)` keeps a half answer; `after_kill()` restarts and returns the messages."""
    desk, conversations = page.desk, page.store.conversations
    key = conversations.create("m").id
    conversations.append(key, "user", "Why?")
    conversations.append(key, "assistant", "Because", token_ids=[65, 66])

    def keep(**change: Any) -> None:
        plan, first = page.engine.default_plan, time.perf_counter() - 1
        live = Live(total=10, cached=4, text="Half", token_ids=[72, 97, 108], num_tokens=3, first_token=first)
        desk.keep(key, Ask(plan.settings, Sampling(), **change), plan, SamplingParams(seed=7), live, 3.0)

    def after_kill() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pitlane.ui.answers._runs", lambda name: False)
            desk.restore()
        return conversations.get(key).messages

    return SimpleNamespace(key=key, keep=keep, after_kill=after_kill, messages=conversations.get(key).messages)


def test_a_half_answer_is_marked_and_has_the_figures_of_its_part(page: Any, talk: SimpleNamespace) -> None:
    page.store.conversations.append(talk.key, "user", "And then?")
    talk.keep()
    page.desk.restore()
    assert len(page.store.conversations.get(talk.key).messages) == 3, "its process runs, so the answer is its own"
    messages = talk.after_kill()
    assert messages[-1].text == "Half" and messages[-1].token_ids == (72, 97, 108) and not page.store.unfinished.list()
    stats = messages[-1].stats
    assert stats["seed"] == 7 and (stats["prompt_tokens"], stats["cached_tokens"], stats["completion_tokens"]) == (
        10,
        4,
        3,
    )
    assert 900 < stats["decode_ms"] < 2500 and stats["ttft_ms"] == pytest.approx(3000 - stats["decode_ms"], abs=1)
    html = thread_html(messages, (), ROLES, talk.key, model=page.engine.loader.source.name)
    assert "interrupted, because the server ended" in html and 'data-do="go_on"' in html


def test_a_half_answer_takes_the_place_that_the_whole_answer_would_have(talk: SimpleNamespace) -> None:
    question, answer = talk.messages
    talk.keep(replaced=answer)
    retried = talk.after_kill()
    assert [message.text for message in retried] == ["Why?", "Half"] and len(retried[1].versions) == 2
    talk.keep(edited=question, text="Why not?")
    edited = talk.after_kill()
    assert [message.text for message in edited] == ["Why not?", "Half"] and len(edited[0].versions) == 2
    talk.keep(continued=edited[1])
    (_, longer) = talk.after_kill()
    assert longer.token_ids == (72, 97, 108) * 2 and longer.stats["continued_after"] == 3


def test_no_half_answer_stays_behind_a_whole_or_a_deleted_one(page: Any, talk: SimpleNamespace) -> None:
    talk.keep()
    page.store.conversations.delete(talk.key)
    assert page.store.unfinished.list() == []
    talk.keep()
    assert page.store.unfinished.list() == [], "a deleted conversation keeps nothing"


def test_an_answer_is_kept_while_it_is_written(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.ui.answering.KEEP_SECONDS", 0.0)
    key = page.store.conversations.create("m").id
    page.store.conversations.append(key, "user", "Why?")
    ask = Ask(page.engine.default_plan.settings, Sampling({"max_tokens": 6}))
    kept = [
        [len(row.token_ids) for row in page.store.unfinished.list()]
        for _ in page.desk.answer((key, "answer"), key, ask)
    ]
    assert [1] in kept and [3] in kept and page.store.unfinished.list() == []
    assert len(page.store.conversations.get(key).messages) == 2


@pytest.mark.slow
@pytest.mark.browser
def test_after_a_kill_in_mid_answer_everything_is_there(tmp_path: Path) -> None:
    (tmp_path / "guide.txt").write_text(TEXT * 30)
    processes: list[subprocess.Popen[str]] = []
    with chromium() as browser:
        with served(tmp_path, pause=0.03, processes=processes) as url:
            tab = browser.new_page()
            tab.set_default_timeout(TIMEOUT)
            tab.goto(url)
            tab.set_input_files("#left input[type=file]", str(tmp_path / "guide.txt"))
            tab.wait_for_selector("#documents :text('KV saved')")
            limit(tab, 100_000)
            tab.fill("#box textarea", "What is the lap record?")
            tab.keyboard.press("Enter")
            tab.wait_for_function(
                "() => (document.querySelector('.live .line')?.innerText || '').match(/[1-9][0-9]+ tokens/)"
            )
            tab.wait_for_timeout(1500)  # an answer is kept once a second
            processes[0].kill()
            place = tab.url.split("#")[1]
        with served(tmp_path) as url:
            tab.goto(f"{url}#{place}")
            tab.wait_for_selector(".message.answer .ending")
            assert "interrupted" in tab.inner_text(".message.answer .ending")
            assert tab.inner_text(".message.answer .body").strip() and tab.is_visible("[data-do=go_on]")
            assert "What is the lap record?" in tab.inner_text("#conversations")
            assert tab.is_visible("#documents [aria-checked=true]") and "KV saved" in tab.inner_text("#documents")
            limit(tab, 8)
            ask(tab, "And when does it open?", 2)
            assert "from cache" in tab.locator("#thread .stats .line").last.inner_text()
