"""The page without a browser: what is drawn from stats, text and rows, the option widgets, the settings, the handlers."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import Field

from pitlane import PluginOptions, PluginRegistry
from pitlane.storage.errors import PitlaneError
from pitlane.storage.types import Document, Page, SavedPrefix, StoredDocument
from pitlane.ui import chat_flow
from pitlane.ui.answering import Desk
from pitlane.ui.app import free_port
from pitlane.ui.effects import effect
from pitlane.ui.first_screen import empty_html
from pitlane.ui.lists import counted, documents_html
from pitlane.ui.markup import citation_html, highlighted, markdown_html, plain_html
from pitlane.ui.option_widgets import option_label, option_widget
from pitlane.ui.panels import Live, live_html, thread_html
from tests.ui.page_harness import TAB, last, new_tab, values

ROLES = {"prompt_lookup": "drafter", "prefix_cache": None}


def stats(**changes: Any) -> dict[str, Any]:
    return {
        "plugins": {"prefix_cache": {}, "prompt_lookup": {}},
        "exactness": "identical",
        "seed": 7,
        "prompt_tokens": 512,
        "cached_tokens": 480,
        "completion_tokens": 60,
        "queue_ms": 0.2,
        "prefill_ms": 40.0,
        "ttft_ms": 41.0,
        "decode_ms": 1100.0,
        "tokens_per_second": 53.2,
        "draft_tokens": 52,
        "accepted_tokens": 37,
        "plugin_ms": {"prompt_lookup": 1.2, "prefix_cache": 0.05},
        "bought_ms": {
            "prompt_lookup": {"ms": 410.0, "how": "modelled"},
            "prefix_cache": {"ms": 62.0, "how": "ablated"},
        },
        "paused": {},
        "failed": {},
    } | changes


DOCUMENT = Document(
    "guide.pdf", "application/pdf", (Page(0, "1", "Opens at 9:40."), Page(1, "2", "Costs £3.20")), "ab" * 32
)


def test_stats_line_says_tokens_times_and_what_each_plugin_did() -> None:
    line = " ".join(chat_flow.stat_parts(stats(), ROLES))
    for part in ("<b>512</b> prompt", "<b>480</b> from cache", "TTFT <b>41 ms</b>", "<b>53.2</b> tok/s"):
        assert part in line
    assert "<em>prompt_lookup</em> <b>37/52</b> accepted, cost 1.2 ms, saved ~410 ms" in line
    assert "<em>prefix_cache</em> saved 62 ms" in line  # ablated: measured, so without a tilde


def test_stats_line_shows_failed_and_paused_plugins_escaped() -> None:
    html = chat_flow.stats_html(stats(failed={"prompt_lookup": "<boom>"}, paused={"prefix_cache": "loses"}), ROLES)
    assert "prompt_lookup failed" in html and "&lt;boom&gt;" in html and "prefix_cache paused" in html


@pytest.mark.parametrize(
    "dtype, batch_invariant, plugins, label",
    [
        ("bfloat16", False, {"prompt_lookup": {}}, "identical up to ties"),
        ("bfloat16", True, {"prompt_lookup": {}}, "identical"),
        ("float64", False, {"prompt_lookup": {}}, "identical"),
        ("bfloat16", False, {}, "identical"),
    ],
)
def test_a_drafter_may_tip_ties_where_rows_depend_on_each_other(
    dtype: str, batch_invariant: bool, plugins: dict[str, Any], label: str
) -> None:
    record = stats(dtype=dtype, batch_invariant=batch_invariant, plugins=plugins)
    assert f">{label}</span>" in chat_flow.stats_html(record, ROLES)


@pytest.mark.parametrize(
    ("after", "reason", "says"),
    [
        ([1, 2, 3], "stop", "same tokens as before</b>"),
        ([1, 9, 3], "length", "first difference at token <b>2</b>"),
        ([1, 2], "stop", "first difference at token <b>3</b>"),
        ([1, 2], "length", "same tokens as before</b> as far as the shorter answer goes, 2"),
        ([1, 2], "aborted", "same tokens as before</b> as far as the shorter answer goes, 2"),
        ([1, 2, 3, 4], "aborted", "first difference at token <b>4</b>"),  # the one before had come to its end
    ],
)
def test_a_retry_is_compared_token_by_token(after: list[int], reason: str, says: str) -> None:
    now = stats(tokens_per_second=106.4, finish_reason=reason)
    now["compared"] = chat_flow.compare([1, 2, 3], stats(plugins={"prefix_cache": {}}), after, now)
    html = chat_flow.compared_html(now)
    assert says in html and "×2.00" in html and "with <em>prompt_lookup</em>" in html


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is said of an answer beside the one that it replaces; both have the same tokens."""
    return chat_flow.compared_html(after | {"compared": chat_flow.compare([1], before, [1], after)})


def test_a_change_of_speed_with_the_same_plugins_is_called_noise() -> None:
    html = compared(stats(), stats(tokens_per_second=106.4, ttft_ms=12.0))
    assert "with the same plugins" in html and "53 → 106 tok/s: the difference is noise" in html
    assert "×" not in html and "TTFT" not in html
    other = compared(stats(plugins={"jacobi": {"window": 4}}), stats(plugins={"jacobi": {"window": 8}}))
    assert "with other options" in other and "×1.00" in other


def test_short_answers_are_not_compared() -> None:
    for counts in ((19, 60), (60, 19)):
        before, after = (stats(completion_tokens=count, plugins={str(count): {}}) for count in counts)
        html = compared(before, after)
        assert "too short to compare speed: 19 tokens, at least 32 are needed" in html and "×" not in html
    assert "×" in compared(stats(completion_tokens=32, plugins={}), stats(completion_tokens=32))


def test_replayed_history_is_named_and_is_no_speed_up() -> None:
    replaying = stats(accepted_tokens=19, notes={"prompt_lookup": {"replayed_tokens": 19}})
    html = compared(stats(plugins={}), replaying)
    assert "<b>19 of 19</b> accepted tokens replayed from earlier answers" in html and "×" not in html
    assert "the answer before replayed <b>19</b> tokens" in compared(replaying, stats(plugins={}))
    assert "<b>19</b> of them replayed from earlier answers" in chat_flow.stats_html(replaying, ROLES)


def test_a_shorter_wait_says_how_much_came_from_cache() -> None:
    html = compared(stats(plugins={}, cached_tokens=0, ttft_ms=400.0), stats(ttft_ms=12.0))
    assert "TTFT 400 ms → <b>12 ms</b> with 480 tokens from cache instead of 0" in html


def test_an_answer_stored_by_an_earlier_version_is_compared() -> None:
    old = {"first_difference": None, "before": {"tokens_per_second": 50.0, "ttft_ms": 9.0}, "plugins": ["prefix_cache"]}
    assert "×1.06" in chat_flow.compared_html(stats(compared=old | {"num_same": None, "same_seed": True}))


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ({"prefix_cache": {}}, "with <em>prompt_lookup</em></span>"),
        ({"prefix_cache": {}, "prompt_lookup": {}, "jacobi": {}}, "without <em>jacobi</em>"),
        ({"jacobi": {}}, "with <em>prefix_cache, prompt_lookup</em> and without <em>jacobi</em>"),
    ],
)
def test_a_retry_says_which_plugins_changed(before: dict[str, dict[str, Any]], says: str) -> None:
    now = stats()
    now["compared"] = chat_flow.compare([1], stats(plugins=before), [1], now)
    assert says in chat_flow.compared_html(now)


def test_a_difference_under_identical_plugins_is_explained_by_rounding_only_in_short_types() -> None:
    for dtype, explained in (("bfloat16", True), ("float64", False)):
        now = stats(dtype=dtype)
        now["compared"] = chat_flow.compare([1, 2], stats(), [1, 3], now)
        assert ("near-tie" in chat_flow.compared_html(now)) is explained


def test_effect_of_a_plugin_is_told_also_when_there_was_none() -> None:
    assert effect("prompt_lookup", stats(), ROLES) == ("good", "saved ~410 ms in the last answer")
    assert "no match" in effect("prompt_lookup", stats(draft_tokens=0), ROLES)[1]
    assert effect("other", stats(), ROLES) == ("", "")
    assert effect("fused_ops", stats(plugins={"fused_ops": {}}), ROLES)[0] == "idle"


def test_a_card_says_that_its_plugin_failed_or_was_paused() -> None:
    gone = stats(plugins={}, failed={"prompt_lookup": "propose: <boom>"})  # a failed plugin is taken out of the plan
    assert effect("prompt_lookup", gone, ROLES) == ("bad", "failed in the last answer: propose: &lt;boom&gt;")
    paused = stats(paused={"prompt_lookup": "drafts cost more than they saved (1.33 plain steps)"})
    tone, text = effect("prompt_lookup", paused, ROLES)
    assert tone == "idle" and text.startswith("paused in the last answer: ")
    assert 'title="1.33 plain steps">drafts cost more than they saved</span>' in text


def test_a_plugin_that_takes_its_time_is_called_slow_and_its_loss_is_said_once() -> None:
    slow = stats(draft_tokens=0, bought_ms={"prompt_lookup": {"ms": 0.0, "how": "modelled"}})
    slow["plugin_ms"] = {"prompt_lookup": 900.0}
    assert effect("prompt_lookup", slow, ROLES) == (
        "bad", "slow: its own work took 900 ms of the last answer, without a draft",
    )  # fmt: skip
    assert effect("other", slow | {"plugins": {"other": {}}, "plugin_ms": {"other": 436.0}}, ROLES)[1].startswith(
        "slow"
    )
    losing = stats(bought_ms={"prompt_lookup": {"ms": -25.0, "how": "modelled"}}, plugin_ms={"prompt_lookup": 36.0})
    line = " ".join(chat_flow.stat_parts(losing, ROLES))
    assert ">lost ~61 ms</span>" in line and "cost" not in line
    assert 'title="its own work took 36 ms, its drafts took 25 ms more than they saved"' in line
    assert effect("prompt_lookup", losing, ROLES)[0] == "bad"


def test_meter_and_reading_progress() -> None:
    assert "width:25.00%" in chat_flow.meter_html(1024, 512, 2048)
    under_sinks = chat_flow.meter_html(9000, 4500, 2048, 8000)
    assert (
        "<b>1\u202f000</b> of 2\u202f048 tokens, 8\u202f000 dropped" in under_sinks and "meter full" not in under_sinks
    )
    assert "meter high" in chat_flow.meter_html(1900, 0, 2048) and "meter full" in chat_flow.meter_html(5000, 0, 2048)
    assert "<b>38 %</b>" in live_html(Live(done=380, total=1000), ())
    assert "480 from cache" in live_html(Live(done=600, total=1000, cached=480), ())


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=y>",
        "[x](javascript:alert(1))",
        "![x](http://evil.example/a.png)",
    ],
)
def test_answers_cannot_bring_code_or_remote_images(text: str) -> None:
    elements: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: elements.append((tag, dict(attrs)))  # type: ignore[method-assign]
    parser.feed(markdown_html(text, [DOCUMENT]))
    assert {tag for tag, _ in elements} <= {"p", "a"}
    assert all(str(attributes["href"]).startswith("http") for tag, attributes in elements if tag == "a")


def test_markdown_links_and_reasoning() -> None:
    assert 'rel="noopener noreferrer nofollow"' in markdown_html("[a](https://example.org)")
    html = markdown_html("<think>hm</think>**yes**")
    assert html.startswith('<details class="thought">') and "<strong>yes</strong>" in html
    assert plain_html("a <b>") == "<p>a &lt;b&gt;</p>"


def test_citations_are_checked_against_their_page() -> None:
    assert 'class="cite found"' in markdown_html("It opens at 9:40 [p. 1].", [DOCUMENT])
    assert 'class="cite unfound"' in markdown_html("It opens at 9:41 [p. 1].", [DOCUMENT])
    assert 'class="cite missing"' in markdown_html("It opens early [p. 3].", [DOCUMENT])
    assert 'class="cite" ' in citation_html(2, "It costs little ", [DOCUMENT])
    assert "cite" not in markdown_html("see [p. 1]")  # nothing to check against


@pytest.mark.parametrize(
    "text",
    [
        "&#xE000;5&#xE001; &#57344;0&#57345;",
        "\ue0000\ue001",
        "[p. 1] &#xE000;0&#xE001;",
        "`[p. 1]` \ue0009\ue001",
        "[p. 99999]",
    ],
)
def test_text_that_looks_like_marks_of_the_page_is_drawn_as_text(text: str) -> None:
    for documents in ((), (DOCUMENT,)):
        html = markdown_html(text, documents)
        assert html.count('class="cite') <= 1 and html.startswith("<p>")
    assert "[p. 1]" in markdown_html("`[p. 1]`", (DOCUMENT,)), "code is quoted, not cited"


def test_a_search_marks_words_and_no_part_of_an_entity() -> None:
    assert highlighted("Tom & [Jerry] <b>", ["jerry", "amp", "lt"]) == "Tom &amp; <mark>Jerry</mark> &lt;b&gt;"
    assert highlighted("a & b", []) == "a &amp; b"
    assert highlighted("a<b", ["<"]) == "a<mark>&lt;</mark>b"


def test_option_widgets_follow_the_schema() -> None:
    class Options(PluginOptions):
        count: int = Field(8, ge=1, le=64, description="how many")
        size: float = Field(10.0, gt=0, le=10_000)
        eager: bool = True
        mode: Literal["a", "b"] = "a"
        name: str | None = None

    schemas = Options.model_json_schema()["properties"]
    made = {name: option_widget(name, schema, schema.get("default")) for name, schema in schemas.items()}
    kinds = {name: type(widget).__name__ for name, widget in made.items()}
    assert kinds == {"count": "Slider", "size": "Number", "eager": "Checkbox", "mode": "Dropdown", "name": "Textbox"}
    assert (made["count"].minimum, made["count"].maximum, made["count"].info) == (1, 64, "how many")


def test_options_are_labelled_by_their_titles_and_else_by_their_names_as_people_write_them() -> None:
    class Options(PluginOptions):
        disk_gb: float = Field(10.0, title="Disk space (GB)")
        max_ngram: int = 4
        num_draft_tokens: int = 8
        wait_ms: int = 5

    schemas = Options.model_json_schema()["properties"]
    labels = [option_label(name, schema) for name, schema in schemas.items()]
    assert labels == ["Disk space (GB)", "Maximum n-gram", "Draft tokens", "Wait (ms)"]


def test_every_option_of_our_plugins_has_a_title() -> None:
    for entry in PluginRegistry.load():
        assert entry.plugin is not None
        for name, field in entry.plugin.Options.model_fields.items():
            assert field.title and field.title[0].isupper(), f"{entry.name}.{name}"


def test_a_document_shows_its_own_share_of_the_kv_saved_with_what_stands_before_it() -> None:
    stored = StoredDocument("ab", "b.txt", "text/plain", "ab" * 32, 1, 300, 0.0)
    prefix = SavedPrefix(1, "f", "h", 1500, "file", 15_000_000, "c", "b.txt", stored.content_hash, False, 0.0, 0.0)

    def listed(tokens: int | None, *prefixes: SavedPrefix) -> str:
        return documents_html(counted([stored], [], lambda key: tokens, prefixes, {}))

    assert "KV saved, 710.0 kB" in listed(71, prefix)
    assert "KV saved, 1.4 MB" in listed(71, prefix, replace(prefix, id=2))
    assert "KV saved</span>" in listed(None, prefix), "its share is not known before its tokens are counted"
    assert "KV saved" not in listed(71) and "KV saved" not in listed(71, replace(prefix, document_hash="other"))


def test_no_word_of_the_empty_page_depends_on_the_width() -> None:
    text = empty_html(())
    assert "left" not in text and "right" not in text and "retry" not in text


def test_page_config_is_private_and_complete(page: Any) -> None:
    config = page.blocks.get_config_file()
    ids = {component["props"].get("elem_id") for component in config["components"]}
    assert {"switch-prefix_cache", "switch-prompt_lookup", "switch-echo", "box", "thread", "documents", "meter"} <= ids
    assert all(
        dependency["api_visibility"] == "private" for dependency in config["dependencies"] if dependency["targets"]
    )
    assert page.blocks.analytics_enabled is False
    assert "http" not in str([c["props"].get("value") for c in config["components"]])


def test_a_question_is_answered_stored_and_retried_with_another_plan(page: Any) -> None:
    handlers, ui = page.handlers, page.handlers.ui
    changes = last(handlers.ask(TAB, "Hello", {"conversation": None, "documents": []}, *values(page)))
    tab = changes[ui.tab]
    first = page.store.conversations.get(tab["conversation"])
    assert [message.role for message in first.messages] == ["user", "assistant"]
    assert changes[ui.live] == "" and 'class="lap"' in changes[ui.thread]
    changes = last(handlers.retry(TAB, SimpleNamespace(id="0"), tab, *values(page, ("prefix_cache", "echo"))))
    assert "same tokens as before" in changes[ui.thread]
    again = page.store.conversations.get(tab["conversation"]).messages
    assert len(again) == 2 and again[1].token_ids == first.messages[1].token_ids
    assert "echo" in again[1].stats["plugins"] and len(page.store.runs.list()) == 2


def test_an_edit_asks_again_from_the_edited_message(page: Any) -> None:
    ui = page.handlers.ui
    tab = last(page.handlers.ask(TAB, "One", {"conversation": None, "documents": []}, *values(page)))[ui.tab]
    question = page.store.conversations.get(tab["conversation"]).messages[0]
    last(page.handlers.edit(TAB, SimpleNamespace(id=str(question.id), text="Two"), tab, *values(page)))
    assert [m.text for m in page.store.conversations.get(tab["conversation"]).messages if m.role == "user"] == ["Two"]


def test_closing_a_tab_stops_compute_and_keeps_what_there_is(page: Any) -> None:
    page.engine.loader.eos_token_ids = frozenset()  # so that it does not end by itself
    answer = page.handlers.ask(TAB, "Go on", {"conversation": None, "documents": []}, *values(page, max_tokens=4000))
    list(islice(answer, 3))  # the third comes while it is written
    answer.close()
    deadline = time.monotonic() + 5
    while page.engine.roster.seqs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not page.engine.roster.seqs
    message = page.store.conversations.get(page.store.conversations.list()[0].id).messages[-1]
    assert message.role == "assistant" and message.stats["finish_reason"] == "aborted" and message.token_ids


def test_an_answer_is_drawn_by_frames_that_hold_what_is_new(page: Any) -> None:
    page.engine.loader.eos_token_ids = frozenset()
    asking = Thread(target=lambda: last(page.handlers.ask(TAB, "Go on", new_tab(), *values(page, max_tokens=300))))
    asking.start()
    while not page.handlers.writing:
        time.sleep(0.001)
    writing = next(iter(page.handlers.writing.values()))
    assert f'data-live="{writing.key}"' in writing.html(), "page.js asks for the frames by this key"
    frames = [page.handlers.frame(writing.key, "a", 0)]
    while "over" not in frames[-1]:
        frames.append(page.handlers.frame(writing.key, "a", frames[-1]["number"]))
        time.sleep(0.002)
    asking.join()
    counts = [int(match[1]) for frame in frames if (match := re.search(r"<b>(\d+)</b> tokens", frame.get("facts", "")))]
    assert len(set(counts)) >= 2 and counts == sorted(counts) and counts[-1] <= 300
    assert page.handlers.frame(writing.key, "a", 0) == {"over": True}


def test_nothing_is_drawn_where_nothing_is_written(page: Any) -> None:
    assert page.handlers.frame("unknown", "a", 0) == {"over": True}
    last(page.handlers.ask(TAB, "Hello", new_tab(), *values(page)))
    assert not page.handlers.writing
    page.handlers.close(TAB)
    assert not page.handlers.writing


def test_a_plugin_that_cannot_serve_the_model_has_no_switch_to_turn(page: Any) -> None:
    cards = {card.plugin.name: card for card in page.handlers.ui.controls.cards}
    assert str(page.engine.loader.dtype) == "torch.float64"
    assert cards["packed_linear"].switch.interactive is False and cards["packed_linear"].switch.value is False
    assert cards["prompt_lookup"].switch.interactive is not False


def test_a_drafter_is_made_ready_when_it_is_switched_on(page: Any) -> None:
    card = next(card for card in page.handlers.ui.controls.cards if card.plugin.name == "prompt_lookup")
    enabled = values(page, ("prompt_lookup",))[len(page.handlers.ui.sampling) :]
    page.handlers.toggled(card)(new_tab(), *enabled)
    plan = page.engine.plan(page.handlers.ui.controls.settings(enabled))
    lane, deadline = page.engine.lanes.by_key[plan.lane_key], time.monotonic() + 20
    while plan not in lane.opened and time.monotonic() < deadline:
        time.sleep(0.01)
    assert plan in lane.opened and lane.is_calibrated, "before anything is asked"


def test_documents_are_read_saved_and_named_when_they_cannot_be(page: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.pdf"
    good.write_text("Facts. " * 60)
    bad.write_bytes(b"")
    ui = page.handlers.ui
    changes = last(
        page.handlers.upload(TAB, [str(good), str(bad)], {"conversation": None, "documents": []}, *values(page))
    )
    assert "bad.pdf: is empty" in changes[ui.notice]
    assert "KV saved" in changes[ui.documents] and 'aria-checked="true"' in changes[ui.documents]
    assert not good.exists() and not bad.exists()  # the uploaded copies
    assert len(changes[ui.tab]["documents"]) == 1


def test_documents_beyond_the_context_are_refused_with_both_numbers(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 4000)
    changes = last(page.handlers.upload(TAB, [str(path)], {"conversation": None, "documents": []}, *values(page)))
    assert str(page.engine.loader.context) in changes[page.handlers.ui.notice]


def test_tab_state_holds_plain_values_only(page: Any, warnings_shown: list[str]) -> None:
    tab = page.handlers.load(TAB, {"conversation": None, "documents": []}, "no such conversation")[page.handlers.ui.tab]
    assert tab == {"conversation": None, "documents": []}


def test_an_unanswered_question_can_be_asked_again(page: Any) -> None:
    key = page.store.conversations.create("m").id
    page.store.conversations.append(key, "user", "Anyone?")
    assert "Ask again" in thread_html(page.store.conversations.get(key).messages, (), ROLES, key)


def test_used_tokens_count_documents_apart(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    desk: Desk = page.desk
    stored = desk.add_file(path)
    used, inside = desk.used_tokens((), [stored.id], None)
    assert 0 < inside < used


def test_a_taken_port_gives_the_next_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 20
    with pytest.raises(PitlaneError, match="give --host"):
        free_port("203.0.113.7", 7860)
