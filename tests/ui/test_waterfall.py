"""Where the time of an answer went, and its accepted draft tokens: HTML from stats."""

from __future__ import annotations

from typing import Any

import pytest

from pitlane import Finished, Result, Stream, TextDelta
from pitlane.ui import chat_flow
from pitlane.ui.answering import Load, _followed
from pitlane.ui.panels import Live
from pitlane.ui.waterfall import accepted_html, first_difference_of, reuse_html, stages, waterfall_html
from tests.ui.page_harness import TAB, last, new_tab, values
from tests.ui.test_page import ROLES, stats


def test_stages_follow_each_other_and_plugins_have_their_share() -> None:
    rows = {row.label: row for row in stages(stats(steps=40, tpot_ms={"p50": 18.0, "p95": 21.0}), ROLES)}
    assert list(rows) == [
        "waited", "read the prompt", "from cache", "computed", "wrote the answer", "forwards, sampling, scheduling",
        "prompt_lookup",
    ]  # fmt: skip
    assert rows["computed"].detail == "32 tokens, 800 tok/s" and rows["from cache"].detail == "480 tokens"
    write, rest, drafter = (rows[name] for name in list(rows)[-3:])
    assert write.start == pytest.approx(40.2) and rest.ms + drafter.ms == pytest.approx(write.ms)
    assert drafter.start == pytest.approx(40.2 + 1100 - 1.2) and drafter.detail == "37 of 52 draft tokens accepted"
    assert write.detail == "60 tokens, 19 ms each; 95 % within 21 ms"


def test_hooks_that_run_in_both_stages_have_no_place_in_time() -> None:
    rows = stages(stats(plugin_ms={"prefix_cache": 5.0, "prompt_lookup": 0.01}), ROLES)
    assert [row.label for row in rows if row.start is None] == ["prefix_cache"]
    assert "prompt_lookup" not in [row.label for row in rows], "noise of the clock"
    html = waterfall_html(stats(prefill_ms=0.0, decode_ms=0.0, queue_ms=0.0, plugin_ms={"<b>": 3.0}), {})
    assert "&lt;b&gt;" in html and "width:100.00%" in html, "no bar is wider than the table"


def test_the_load_of_weights_is_no_waiting() -> None:
    rows = stages(stats(queue_ms=5000.0, load_ms=4800.0, waited_ms=300.0), ROLES)
    assert [(row.label, row.start, row.ms) for row in rows[:2]] == [
        ("loaded the weights", 0.0, 4800.0),
        ("waited", 4800.0, 300.0),
    ]
    assert rows[2].start == 5100.0
    assert "loaded the weights: 4.8 s" in chat_flow.lap_html(stats(queue_ms=5000.0, load_ms=4800.0, waited_ms=300.0))
    during, before = Load(10.0, 14.0), Load(10.0, 12.0)
    assert during.stats(11.0, 3100.0) == {"load_ms": 4000.0, "waited_ms": 100.0}, (
        "the question was with the engine meanwhile"
    )
    assert before.stats(12.5, 70.0) == {"load_ms": 2000.0, "waited_ms": 70.0} and Load().stats(1.0, 9.0) == {}


def test_the_page_takes_the_time_of_a_load(page: Any) -> None:
    def stats_of(*plugins: str) -> Any:
        changes = last(page.handlers.ask(TAB, "Hello", new_tab(), *values(page, plugins, max_tokens=3)))
        return page.store.conversations.get(changes[page.handlers.ui.tab]["conversation"]).messages[-1].stats

    first, again = stats_of("int8"), stats_of("int8")
    assert first["load_ms"] > 0 and first["waited_ms"] <= first["queue_ms"] and "load_ms" not in again


def test_the_folded_line_has_the_figures_and_whatever_went_wrong() -> None:
    line = " ".join(chat_flow.head_parts(stats(paused={"prompt_lookup": "loses"}, failed={"other": "boom"})))
    for part in ("<b>512</b> prompt", "<b>480</b> from cache", "TTFT", "plugins saved ~471 ms", "paused", "boom"):
        assert part in line
    assert "seed" not in line and "cost" not in line
    html = chat_flow.stats_html(stats(), ROLES)
    assert html.index("<summary>") < html.index("</summary>") < html.index("seed 7") < html.index("</details>")


def test_the_first_token_that_differs_from_an_earlier_prompt_is_found() -> None:
    document = list(range(100))
    difference = first_difference_of([*document, 7, 8], [[1, 2], [*document, 9, 9, 9], [*document[:50], 0, 0]])
    assert difference == (100, [*document, 9, 9, 9])
    assert first_difference_of([*document, 7], [[5, 5], document]) is None, "the next turn only goes on"
    assert first_difference_of(document, [[0, 1, 2, 99]]) is None and first_difference_of(document, []) is None
    html = reuse_html(stats(cached_tokens=480, reuse={"same": 500, "now": "<When>", "before": "What"}))
    assert "500 tokens, then <q>&lt;When&gt;</q> instead of <q>What</q>" in html and "Only" not in html
    assert "Only 0 of them" in reuse_html(stats(cached_tokens=0, reuse={"same": 500, "now": "a", "before": "b"}))
    assert reuse_html(stats()) == ""


def test_the_page_says_where_a_prompt_differs(page: Any) -> None:
    last(page.handlers.ask(TAB, "When is the track open today?", new_tab(), *values(page)))
    changes = last(page.handlers.ask(TAB, "When is the track closed today?", new_tab(), *values(page)))
    answer = page.store.conversations.get(changes[page.handlers.ui.tab]["conversation"]).messages[-1]
    assert answer.stats["reuse"]["now"].startswith("c") and answer.stats["reuse"]["before"].startswith("o")


def test_accepted_draft_tokens_are_tinted_in_the_text() -> None:
    assert accepted_html("a <b> c", [[2, 5]]) == '<p class="accepted">a <mark>&lt;b&gt;</mark> c</p>'
    assert accepted_html("text", []) == ""


def test_the_page_knows_which_characters_came_from_accepted_drafts(page: Any) -> None:
    page.engine.loader.eos_token_ids = frozenset()
    changes = last(page.handlers.ask(TAB, "a a a a a", new_tab(), *values(page, ("echo",), max_tokens=60)))
    answer = page.store.conversations.get(changes[page.handlers.ui.tab]["conversation"]).messages[-1]
    live, result, stream = Live(), Result("xyz", [1, 2, 3, 4], "stop", {}), Stream(lambda: None)
    for event in (TextDelta("x", (1,)), TextDelta("yz", (2, 3, 4)), Finished(result)):
        stream.put(event)
    list(_followed(stream, live))
    assert live.accepted == [(1, 3)], "the last token of a step is the model's own"
    spans, accepted = answer.stats.get("accepted_text", []), answer.stats["accepted_tokens"]
    assert len(spans) <= accepted and bool(spans) == bool(accepted)
    assert all(0 <= start <= stop <= len(answer.text) for start, stop in spans)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
