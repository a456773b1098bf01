"""Every handler of the page at each early return: nothing on the page may vanish, and whatever goes wrong is said."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitlane import Plugin, PluginOptions
from pitlane.storage.errors import StorageError
from pitlane.ui.controls import PluginControls
from pitlane.ui.lists import notice_html
from pitlane.ui.offline_gradio import gr
from pitlane.ui.option_widgets import option_widget
from pitlane.ui.page_event import page_event
from tests.ui.page_harness import OTHER_TAB, TAB, card_of, event, last, new_tab, values

KEPT_BY_GRADIO = {"__type__": "update"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.ui.document_events.SAVE_SECONDS", 0.0)


EARLY: dict[str, Callable[[Any, list[Any]], Any]] = {
    "ask nothing": lambda on, now: on.ask(TAB, "", new_tab(), *now),
    "ask spaces": lambda on, now: on.ask(TAB, " \n", new_tab(), *now),
    "ask in a deleted conversation": lambda on, now: on.ask(TAB, "Hi", new_tab("gone"), *now),
    "ask with a bad seed": lambda on, now: on.ask(TAB, "Hi", new_tab(), *now[:3], "abc", *now[4:]),
    "ask with an unknown value": lambda on, now: on.ask(TAB, "Hi", new_tab(), -1, *now[1:]),
    "edit to nothing": lambda on, now: on.edit(TAB, event(id="1", text=" "), new_tab("gone"), *now),
    "edit before there is a conversation": lambda on, now: on.edit(TAB, event(id="1", text="x"), new_tab(), *now),
    "edit a message that is gone": lambda on, now: on.edit(TAB, event(id="7", text="x"), new_tab("gone"), *now),
    "retry before there is a conversation": lambda on, now: on.retry(TAB, event(id="1"), new_tab(), *now),
    "retry in a deleted conversation": lambda on, now: on.retry(TAB, event(id="1"), new_tab("gone"), *now),
    "turn off an unknown plugin": lambda on, now: on.turn_off(TAB, event(id="nope"), new_tab(), *now),
    "turn on an unknown plugin": lambda on, now: on.turn_on(TAB, event(id="nope"), new_tab(), *now),
    "take out an unknown document": lambda on, now: on.take_out(TAB, event(id="nope"), new_tab(), *now),
    "upload nothing": lambda on, now: on.upload(TAB, [], new_tab(), *now),
    "upload no list": lambda on, now: on.upload(TAB, None, new_tab(), *now),
    "attach a removed document": lambda on, now: on.attach(TAB, event(id="nope"), new_tab(), *now),
    "discard a removed document": lambda on, now: on.discard(TAB, event(id="nope"), new_tab()),
    "settle nothing": lambda on, now: on.settle(TAB, new_tab()),
    "stop nothing": lambda on, now: on.stop(TAB),
    "open a deleted conversation": lambda on, now: on.open(TAB, event(id="gone"), new_tab(), ""),
    "rename to nothing": lambda on, now: on.rename(event(id="gone", text=" "), new_tab(), ""),
    "rename a deleted conversation": lambda on, now: on.rename(event(id="gone", text="x"), new_tab(), ""),
    "remove a deleted conversation": lambda on, now: on.remove(TAB, event(id="gone"), new_tab(), ""),
    "compare a deleted answer": lambda on, now: on.compare(TAB, event(id="7"), new_tab("gone"), *now),
    "compare with a bad seed": lambda on, now: on.compare(TAB, event(id=""), new_tab(), *now[:3], "abc", *now[4:]),
    "run a comparison without a view": lambda on, now: on.compare_run(TAB, event(id="")),
    "show a comparison without a view": lambda on, now: on.compare_show(TAB),
    "cancel no comparison": lambda on, now: on.compare_stop(TAB),
    "load a deleted conversation": lambda on, now: on.load(TAB, new_tab(), "gone", "{}"),
    "load damaged values": lambda on, now: on.load(TAB, new_tab(), "", "[1"),
    "load values of another kind": lambda on, now: on.load(TAB, new_tab(), "", '{"values": 3, "documents": 4}'),
}


WARNED = {name for name in EARLY if any(word in name for word in ("deleted", "bad", "is gone", "unknown value"))}
WARNED |= {"retry before there is a conversation", "edit before there is a conversation", "turn off an unknown plugin"}
WARNED |= {"turn on an unknown plugin"}
WARNED |= {"take out an unknown document"}


def test_a_handler_that_returns_early_empties_nothing(page: Any, warnings_shown: list[str]) -> None:
    warned = set()
    for name, call in EARLY.items():
        found = call(page.handlers, values(page))
        changes = list(found) if inspect.isgenerator(found) else [found]
        assert changes, f"{name}: Gradio empties every output of a generator that yields nothing"
        assert all(changes), f"{name}: Gradio refuses an empty dictionary"
        assert all(value is not None for change in changes for value in change.values()), name
        warned |= {name} if warnings_shown else set()
        warnings_shown.clear()
    assert not page.handlers.writing and not page.store.conversations.list()
    assert warned == WARNED


def test_every_handler_of_the_page_goes_through_page_event(page: Any) -> None:
    handlers = [fn.fn for fn in page.blocks.fns.values() if fn.fn is not None and fn.outputs]
    assert len(handlers) > 20
    assert all(hasattr(handler, "__wrapped__") for handler in handlers), "page_event keeps what it wraps"


def test_an_error_that_a_handler_lets_through_is_shown_and_changes_nothing(warnings_shown: list[str]) -> None:
    @page_event
    def step() -> Any:
        raise StorageError("the disk is <full>")

    @page_event
    def steps() -> Any:
        yield {}
        raise StorageError("the disk is <full>")

    assert step() == KEPT_BY_GRADIO and list(steps()) == [KEPT_BY_GRADIO]
    assert warnings_shown == ["the disk is &lt;full&gt;"] * 2, "Gradio reads a warning as HTML"


# ---- switches


def test_a_drafter_that_is_switched_on_takes_the_place_of_another(page: Any) -> None:
    ui, card, other = page.handlers.ui, card_of(page, "prompt_lookup"), card_of(page, "echo")
    changes = page.handlers.toggled(card)(new_tab(), *values(page, ("echo", "prompt_lookup"))[len(ui.sampling) :])
    assert changes[other.switch] is False and card.switch not in changes
    assert "prompt_lookup replaces echo; a plan has one drafter" in changes[card.note] and changes[other.note] == ""
    assert "prompt_lookup" in changes[ui.plan] and "echo" not in changes[ui.plan]
    changes = page.handlers.toggled(card)(new_tab(), *values(page, ("prompt_lookup",))[len(ui.sampling) :])
    assert changes[card.note] == "" and other.switch not in changes


def test_a_refused_toggle_says_why_at_its_card(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ui, card = page.handlers.ui, card_of(page, "prompt_lookup")
    monkeypatch.setattr(card.plugin, "requires", ("echo",))
    changes = page.handlers.toggled(card)(new_tab(), *values(page, ("prompt_lookup",))[len(ui.sampling) :])
    assert "prompt_lookup requires echo; enable it too" in changes[card.note] and 'role="alert"' in changes[card.note]
    assert changes[card.switch] is False and "prompt_lookup" not in changes[ui.plan], "the plan is the one before"


def test_an_option_that_cannot_be_is_refused_at_its_card(page: Any) -> None:
    ui, card = page.handlers.ui, card_of(page, "prompt_lookup")
    now = values(page, ("prompt_lookup",))[len(ui.sampling) :]
    names = ui.controls.names
    now[names.index("prompt_lookup.min_ngram")], now[names.index("prompt_lookup.max_ngram")] = 9, 2
    changes = page.handlers.toggled(card)(new_tab(), *now)
    assert "min_ngram must be at most max_ngram" in changes[card.note]


# ---- values


def test_an_empty_seed_stays_empty_and_each_answer_names_its_seed(page: Any) -> None:
    seed = page.handlers.ui.sampling[3]
    assert isinstance(seed, gr.Textbox) and seed.value == "", "an empty gr.Number becomes 0 when it is first seen"
    changes = last(page.handlers.ask(TAB, "Hello", new_tab(), *values(page)))
    message = page.store.conversations.get(changes[page.handlers.ui.tab]["conversation"]).messages[-1]
    assert f"seed {message.stats['seed']}" in changes[page.handlers.ui.thread]


def test_a_seed_is_read_as_it_is_typed(page: Any) -> None:
    now = values(page)
    for typed, seed in (("", None), (None, None), (" 7 ", 7), ("0", 0), (12, 12)):
        assert page.handlers.read([*now[:3], typed, *now[4:]]).sampling.greedy().seed == seed


def test_a_seed_that_cannot_be_keeps_the_question_in_the_box(page: Any, warnings_shown: list[str]) -> None:
    now = values(page)
    for typed in ("abc", "1.5", "-1", "1e3", str(2**70)):
        changes = last(page.handlers.ask(TAB, "Hello", new_tab(), *now[:3], typed, *now[4:]))
        assert page.handlers.ui.box not in changes
        assert typed in warnings_shown[-1] and "seed" in warnings_shown[-1]


def test_an_optional_number_may_be_empty() -> None:
    class Options(PluginOptions):
        limit: int | None = None

    schema = Options.model_json_schema()["properties"]["limit"]
    assert isinstance(option_widget("limit", schema, None), gr.Textbox)


def test_an_empty_optional_option_has_its_default(make_engine: Any) -> None:
    class Limited(Plugin):
        """limited: Does nothing, up to a limit."""

        name, exactness = "limited", "identical"

        class Options(PluginOptions):
            limit: int | None = None

    engine = make_engine()
    engine.registry.add(Limited)

    async def made() -> PluginControls:
        with gr.Blocks(analytics_enabled=False):
            return PluginControls(engine.registry, engine.default_plan, engine.loader.build_context)

    controls = asyncio.run(made())  # Gradio makes its locks where a loop runs
    now = [widget.value for widget in controls.inputs]
    place = controls.names.index("limited")
    now[place : place + 2] = [True, ""]
    assert controls.settings(now)["limited"] == {}
    now[place + 1] = "5"
    assert engine.plan({"limited": controls.settings(now)["limited"]}).settings["limited"]["limit"] == 5


# ---- reload


def test_a_reload_brings_back_switches_options_sampling_and_documents(page: Any, tmp_path: Path) -> None:
    ui, path = page.handlers.ui, tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    tab = last(page.handlers.upload(TAB, [str(path)], new_tab(), *values(page)))[ui.tab]
    before = page.handlers.new(TAB, tab)
    assert json.loads(before[ui.attached]) == tab["documents"]
    kept = dict(zip(page.handlers.value_names, values(page, ("prefix_cache", "echo")), strict=True))
    kept |= {"max_tokens": 33, "prompt_lookup.max_ngram": 5, "of another version": 1}
    changes = page.handlers.load(
        OTHER_TAB, new_tab(), "", json.dumps({"values": kept, "documents": [*tab["documents"], "removed"]})
    )
    assert changes[ui.tab] == tab
    assert changes[card_of(page, "echo").switch] is True and "echo" in changes[ui.plan]
    assert changes[ui.sampling[2]] == 33
    assert changes[card_of(page, "prompt_lookup").fields["max_ngram"]] == 5


def test_kept_values_that_cannot_be_are_left_out(page: Any) -> None:
    kept = dict(zip(page.handlers.value_names, values(page), strict=True))
    for change in ({"prompt_lookup": True, "echo": True}, {"thinking": "maybe"}, {"seed": "abc"}):
        changes = page.handlers.load(TAB, new_tab(), "", json.dumps({"values": kept | change}))
        assert changes[page.handlers.ui.tab] == new_tab()
        assert page.handlers.ui.plan not in changes and page.handlers.ui.sampling[3] not in changes


# ---- files


def test_a_file_that_is_stored_already_is_named(page: Any, tmp_path: Path) -> None:
    ui, tab = page.handlers.ui, new_tab()
    for name, says in (
        ("a.txt", ""),
        ("a.txt", "Already here: a.txt"),
        ("b&amp;.txt", "b&amp;amp;.txt is already here: a.txt"),
    ):
        (tmp_path / name).write_text("Facts. " * 20)
        changes = last(page.handlers.upload(TAB, [str(tmp_path / name)], tab, *values(page)))
        assert (says in changes[ui.notice]) if says else changes[ui.notice] == ""
        tab = changes[ui.tab]
    assert len(tab["documents"]) == 1
    assert page.handlers.dismiss() == {ui.notice: ""}


def test_files_that_come_one_after_the_other_are_all_attached(page: Any, tmp_path: Path) -> None:
    names = [tmp_path / f"{number}.txt" for number in range(2)]
    for path in names:
        path.write_text(f"Facts of {path.name}. " * 20)
    first = page.handlers.upload(TAB, [str(names[0])], new_tab(), *values(page))
    next(first)  # "Reading ..."
    second = page.handlers.upload(TAB, [str(names[1])], new_tab(), *values(page))
    last(second)
    changes = last(first)
    assert len(changes[page.handlers.ui.tab]["documents"]) == 2


def test_a_file_that_is_read_does_not_pull_the_tab_back(page: Any, tmp_path: Path) -> None:
    ui, path = page.handlers.ui, tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    here, there = (page.store.conversations.create("m").id for _ in range(2))
    reading = page.handlers.upload(TAB, [str(path)], new_tab(here), *values(page))
    next(reading)
    page.handlers.open(TAB, event(id=there), new_tab(here), "")
    changes = last(reading)
    assert ui.thread not in changes and ui.tab not in changes
    assert page.store.conversations.get(here).document_ids and not page.store.conversations.get(there).document_ids


def test_a_notice_names_problems_first_and_can_be_dismissed() -> None:
    html = notice_html(["bad <pdf>"], ["Already here: a"])
    assert html.index("bad &lt;pdf&gt;") < html.index("Already here") and 'data-do="dismiss"' in html
    assert 'role="alert"' in html and 'role="status"' in notice_html([], ["x"]) and notice_html([]) == ""
