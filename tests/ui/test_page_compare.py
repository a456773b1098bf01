"""The Compare view: over an answer and over a new question, its plans, its run, its report, and gains at the plugin cards."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from typing import Any

import pytest

from pitlane.ui.bench.gains import measured_gains
from pitlane.ui.bench.turns import Cancelled
from pitlane.ui.compare_panel import Choice, Setup, progress_html, setup_html
from pitlane.ui.effects import effect
from tests.ui.page_harness import OTHER_TAB, TAB, card_of, event, last, new_tab, values

NUM_TOKENS = 33


@pytest.fixture
def endless(page: Any) -> Any:
    """A page whose answers run to their limit."""
    page.engine.loader.eos_token_ids = frozenset()
    return page


def asked(page: Any, text: str = "Say it <again>: one two") -> dict[str, Any]:
    """The tab after a question and its answer."""
    changes = last(page.handlers.ask(TAB, text, new_tab(), *values(page, max_tokens=NUM_TOKENS)))
    tab: dict[str, Any] = changes[page.handlers.ui.tab]
    return tab


def opened(page: Any, tab: dict[str, Any], enabled: tuple[str, ...] = ("prefix_cache",)) -> str:
    """The view over the last answer of a tab."""
    message = page.store.conversations.get(tab["conversation"]).messages[-1]
    now = values(page, enabled, NUM_TOKENS)
    changes = page.handlers.compare(TAB, event(id=str(message.id)), tab, *now)
    return str(changes[page.handlers.ui.compare])


def ran(page: Any, *plans: str, **fields: Any) -> str:
    """The view after a run of the plans."""
    steps = list(page.handlers.compare_run(TAB, event(id="", fields={"plan": list(plans), "laps": "3"} | fields)))
    assert set(steps[0]) == {page.handlers.ui.compare_live}, "a run changes one widget until its end"
    return str(page.handlers.compare_show(TAB)[page.handlers.ui.compare])


def keys(html: str) -> list[str]:
    return re.findall(r'name="plan" value="([^"]+)"', html)


def test_the_view_over_an_answer_has_its_question_seed_and_plans(endless: Any) -> None:
    tab = asked(endless)
    html = opened(endless, tab)
    seed = endless.store.conversations.get(tab["conversation"]).messages[-1].stats["seed"]
    assert "Say it &lt;again&gt;: one two" in html and f"seed {seed}" in html and "<textarea" not in html
    assert keys(html)[:2] == ["core", "now"], "the default and the answer's plan are the present plan"
    assert {"+echo", "+prompt_lookup", "−prefix_cache"} <= set(keys(html)), "the present plan with one plugin changed"
    assert html.count(" checked") == 2 and 'data-do="compare_run"' in html


def test_a_plan_of_its_own_stands_beside_the_default_and_the_answers(endless: Any) -> None:
    tab = asked(endless)
    html = opened(endless, tab, enabled=("echo",))
    assert keys(html)[:3] == ["core", "default", "now"] and "Default, as answered" in html
    assert {"−echo", "+prefix_cache"} <= set(keys(html))
    setup = endless.handlers.setups[TAB.session_hash]
    lookup = next(choice for choice in setup.choices if choice.key == "+prompt_lookup")
    assert set(lookup.settings) == {"prompt_lookup"}, "a plan has one drafter"


@pytest.mark.usefixtures("always_draft")
def test_a_run_shows_its_report_keeps_it_and_measures_the_plugin(endless: Any) -> None:
    tab = asked(endless)
    before = endless.store.conversations.get(tab["conversation"]).messages
    opened(endless, tab)
    html = ran(endless, "now", "+echo")
    assert html.count("<tr ") == 2 and "identical</span>" in html and "<details>" in html
    assert endless.store.conversations.get(tab["conversation"]).messages == before, "a comparison writes no message"
    (stored,) = endless.store.comparisons.list()
    assert stored.report["repeats"] == 3 and "text" not in stored.report["plans"][0]
    assert stored.report["seed"] == before[-1].stats["seed"]
    exported = json.loads(b64decode(re.findall(r"data:application/json;base64,([^\"]+)", html)[0]))
    assert exported["plans"][1]["bought_ms"]["echo"]["how"] == "ablated"
    assert "label" in b64decode(re.findall(r"data:text/csv;base64,([^\"]+)", html)[0]).decode().splitlines()[0]
    shown = endless.handlers.compare_show(TAB)[card_of(endless, "echo").effect]
    assert "compared on 20" in shown and "random:tiny" in shown and f"{NUM_TOKENS} tokens" in shown


def test_the_first_screen_asks_for_a_question_over_the_sample(endless: Any) -> None:
    changes = endless.handlers.compare(TAB, event(id=""), new_tab(), *values(endless, max_tokens=4))
    html = changes[endless.handlers.ui.compare]
    assert "<textarea" in html and "sample.pdf" in html and "When is the track open?" in html
    assert "the question is empty" in ran(endless, "core", question=" ")
    assert "no plan is marked" in ran(endless, question="Hi")
    html = ran(endless, "core", question="What <b>now</b>?")
    assert "What &lt;b&gt;now&lt;/b&gt;?" in html and html.count("<tr ") == 1 and "Too short to compare" in html


def test_a_run_is_cancelled_by_its_button_a_closed_tab_and_a_change_of_model(
    endless: Any, monkeypatch: pytest.MonkeyPatch, warnings_shown: list[str]
) -> None:
    on = endless.handlers
    opened(endless, asked(endless))

    def endless_comparison(*args: Any) -> Any:
        run = on.runs[TAB.session_hash]
        while not run.is_cancelled:
            args[-2](0, 9)
        raise Cancelled

    monkeypatch.setattr("pitlane.ui.bench.comparison.compare", endless_comparison)
    monkeypatch.setattr("pitlane.ui.compare_events.FRAME_SECONDS", 0.01)
    for end in (lambda: on.compare_stop(TAB), lambda: on.close(TAB), on.retire):
        on.reopen()
        opened(endless, asked(endless))
        steps = on.compare_run(TAB, event(id="", fields={"plan": ["core"]}))
        assert "running" in next(steps)[on.ui.compare_live]
        assert list(on.compare_run(TAB, event(id="", fields={}))) == [{"__type__": "update"}], "one run per tab"
        on.compare_stop(OTHER_TAB)
        end()
        list(steps)
        assert not on.runs
    steps = on.compare_run(TAB, event(id="", fields={"plan": ["core"]}))
    assert list(steps) == [{"__type__": "update"}] and len(warnings_shown) == 1, "the model is about to change"
    on.reopen()
    steps = on.compare_run(TAB, event(id="", fields={"plan": ["core"]}))
    next(steps)
    steps.close()
    assert not on.runs and "Cancelled" in on.compare_show(TAB)[on.ui.compare], "Gradio closes the event of a closed tab"


def test_an_error_of_a_run_is_shown_in_the_view(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(endless, asked(endless))

    def broken(*_: Any) -> Any:
        raise RuntimeError("<out> of order")

    monkeypatch.setattr("pitlane.ui.bench.comparison.compare", broken)
    assert "RuntimeError: &lt;out&gt; of order" in ran(endless, "core")


def test_a_report_is_saved_as_a_chart_and_earlier_comparisons_are_drawn(endless: Any) -> None:
    tab = asked(endless)
    opened(endless, tab)
    html = ran(endless, "now", "core")
    (chart,) = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert b64decode(chart).startswith(b"\x89PNG") and len(b64decode(chart)) > 5000
    assert "polyline" not in html, "one comparison is no history"
    html = ran(endless, "now")
    assert html.count("<polyline") == 1 and "2 comparisons" in html and "prefix_cache" in html
    (points,) = re.findall(r'points="([^"]+)"', html)
    assert len(points.split()) == 2


# ---- texts


def test_progress_says_what_it_waits_for() -> None:
    assert "Loading the weights" in progress_html(0, 0)
    assert "Lap <b>5</b> of 16" in progress_html(4, 16) and "width:25%" in progress_html(4, 16)
    assert "Lap <b>16</b> of 16" in progress_html(16, 16)


def test_all_text_of_the_view_is_escaped() -> None:
    evil = '"><script>'
    choice = Choice(evil, evil, evil, {})
    html = setup_html(Setup(evil, False, (evil,), (choice,), (evil,), error=evil))
    assert "<script>" not in html and html.count("&lt;script&gt;") >= 6


def test_a_measured_gain_takes_the_place_of_a_modelled_one() -> None:
    stats = {
        "plugins": {"x": {}}, "failed": {}, "paused": {}, "plugin_ms": {"x": 1.0}, "prefill_ms": 50.0, "decode_ms": 50.0,
        "draft_tokens": 5, "bought_ms": {"x": {"ms": 30.0, "how": "modelled"}},
    }  # fmt: skip
    roles = {"x": "drafter"}
    assert effect("x", stats, roles) == ("good", "saved ~30 ms in the last answer")
    gain = "saved 20 ms (18 ms to 22 ms) in an answer of 40 tokens; compared on 2026-11-30, <m>"
    tone, line = effect("x", stats, roles, gain)
    assert tone == "good" and "compared on 2026-11-30, &lt;m&gt;" in line and "~" not in line
    assert effect("x", None, {}, gain)[1] == line, "without an answer too"
    assert "failed" in effect("x", stats | {"failed": {"x": "broke"}}, roles, gain)[1]
    assert "paused" in effect("x", stats | {"paused": {"x": "no gain"}}, roles, gain)[1]
    assert effect("x", stats, roles, "saved nothing beyond noise in an answer")[0] == "idle"


def test_the_latest_comparison_of_the_model_counts(page: Any) -> None:
    def report(model: str, ms: float) -> dict[str, Any]:
        gain = {"ms": ms, "low": ms - 1, "high": ms + 1, "how": "ablated", "against": "core"}
        return {"model": model, "plans": [{"bought_ms": {"echo": gain}, "completion_tokens": 40}]}

    for model, ms in (("a", 10.0), ("a", -20.0), ("b", 30.0)):
        page.store.comparisons.add(report(model, ms))
    assert measured_gains(page.store, "a")["echo"].startswith("lost 20 ms (19 ms to 21 ms) in an answer of 40 tokens")
    assert measured_gains(page.store, "c") == {}
