"""The page's conversations when something goes wrong or happens at once: nothing is lost, nothing goes to the wrong thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest

from pitlane import BadOption, PromptTooLong
from pitlane.storage.errors import StorageError
from pitlane.storage.types import Message, Refusal
from pitlane.ui.answers import plan_of_both
from pitlane.ui.ask import Ask
from pitlane.ui.panels import thread_html
from pitlane.ui.refusals import refusal_of
from pitlane.ui.sampling import Sampling
from tests.ui.page_harness import OTHER_TAB, TAB, card_of, event, last, new_tab, values
from tests.ui.test_page import stats

TOO_LONG = "w" * 5000
NONE = event(id="0")
NOTHING = {"__type__": "update"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.ui.document_events.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("gradio.Info", lambda text: None)


def conversation(page: Any, *texts: str) -> str:
    """A stored conversation of questions and answers in turn."""
    key = str(page.store.conversations.create("m").id)
    for number, text in enumerate(texts):
        page.store.conversations.append(key, "assistant" if number % 2 else "user", text)
    return key


def messages(page: Any, key: str) -> list[Message]:
    return list(page.store.conversations.get(key).messages)


def texts(page: Any, key: str) -> list[str]:
    return [message.text for message in messages(page, key)]


def endless(page: Any, key: str | None = None, tab: Any = TAB) -> Iterator[Any]:
    """A question whose answer ends when it is stopped; it is being written when this returns."""
    page.engine.loader.eos_token_ids = frozenset()
    answer = page.handlers.ask(tab, "Go on", new_tab(key), *values(page, max_tokens=4000))
    list(islice(answer, 2))
    return iter(answer)


# ---- refused questions


def test_a_refused_question_shows_its_reason_and_is_no_part_of_later_prompts(page: Any) -> None:
    ui, key = page.handlers.ui, conversation(page)
    changes = last(page.handlers.ask(TAB, TOO_LONG, new_tab(key), *values(page)))
    refusal = messages(page, key)[-1].refusal
    assert refusal is not None and str(page.engine.loader.context) in refusal.reason
    assert refusal.reason.split(";")[0] in changes[ui.thread] and 'data-do="retry"' in changes[ui.thread]
    assert changes[ui.live] == "" and 'data-do="edit"' in changes[ui.thread].split("refusal")[1]
    for text in ("short", "short again"):
        changes = last(page.handlers.ask(TAB, text, new_tab(key), *values(page)))
        assert messages(page, key)[-1].role == "assistant"
    assert [m.role for m in messages(page, key)] == ["user", "user", "assistant", "user", "assistant"]
    reloaded = page.handlers.load(OTHER_TAB, new_tab(), key)[ui.thread]
    assert refusal.reason.split(";")[0] in reloaded, "kept with its question"
    assert 'class="ways"' not in reloaded, "buttons are for the last message"


def test_a_text_longer_than_the_context_is_answered_with_the_plugin_that_the_refusal_names(page: Any) -> None:
    ui, key = page.handlers.ui, conversation(page)
    changes = last(page.handlers.ask(TAB, TOO_LONG, new_tab(key), *values(page)))
    assert 'data-do="turn_on" data-id="attention_sinks"' in changes[ui.thread]
    changes = last(page.handlers.turn_on(TAB, event(id="attention_sinks"), new_tab(key), *values(page)))
    assert changes[card_of(page, "attention_sinks").switch] is True
    answer = messages(page, key)[-1]
    assert answer.role == "assistant" and answer.stats is not None
    assert answer.stats["notes"]["attention_sinks"]["dropped_tokens"] > 3000
    assert "the model no longer sees tokens 5 to" in changes[ui.thread]


def test_the_page_says_when_dropped_text_is_read_again(page: Any) -> None:
    ui, key, both = page.handlers.ui, conversation(page), ("prefix_cache", "attention_sinks")
    last(page.handlers.ask(TAB, "w" * 2000, new_tab(key), *values(page, both)))
    changes = last(page.handlers.ask(TAB, "again", new_tab(key), *values(page, both)))
    assert "read whole again" not in changes[ui.thread]
    changes = last(page.handlers.ask(TAB, "whole", new_tab(key), *values(page)))
    assert "read whole again without <em>attention_sinks</em>" in changes[ui.thread]


def test_a_refused_retry_keeps_the_old_answer_and_says_why(page: Any) -> None:
    key, now = conversation(page, "hi", "the old answer"), values(page)
    changes = last(page.handlers.retry(TAB, NONE, new_tab(key), *now[:4], "s" * 5000, *now[5:]))
    assert texts(page, key) == ["hi", "the old answer"]
    assert "No new answer:" in changes[page.handlers.ui.thread] and "the old answer" in changes[page.handlers.ui.thread]
    changes = last(page.handlers.retry(TAB, NONE, new_tab(key), *now))
    assert len(texts(page, key)) == 2 and "the old answer" not in texts(page, key)
    assert "No new answer:" not in changes[page.handlers.ui.thread]


def test_a_refused_edit_loses_nothing(page: Any) -> None:
    key = conversation(page, "one", "1", "two", "2")
    first = messages(page, key)[0]
    last(page.handlers.edit(TAB, event(id=str(first.id), text=TOO_LONG), new_tab(key), *values(page)))
    assert texts(page, key) == ["one", "1", "two", "2", TOO_LONG] and messages(page, key)[-1].refusal is not None
    refused = messages(page, key)[-1]
    last(page.handlers.edit(TAB, event(id=str(refused.id), text=TOO_LONG + "w"), new_tab(key), *values(page)))
    assert texts(page, key) == ["one", "1", "two", "2", TOO_LONG + "w"], "a question without an answer is replaced"
    last(page.handlers.edit(TAB, event(id=str(first.id), text="uno"), new_tab(key), *values(page)))
    assert texts(page, key)[0] == "uno" and len(texts(page, key)) == 2


def test_an_error_that_nobody_foresaw_is_a_refusal_too(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(page.engine, "submit", broken)
    key = conversation(page)
    changes = last(page.handlers.ask(TAB, "Hi", new_tab(key), *values(page)))
    assert "ZeroDivisionError: a bug" in changes[page.handlers.ui.thread] and not page.handlers.writing


def test_ways_out_follow_from_the_error() -> None:
    def ways(error: Exception) -> tuple[tuple[str, str], ...]:
        return refusal_of(error, ["speculative", "prefix_cache"], ["prefix_cache"], ["a", "b", "c", "d"]).ways

    assert ways(PromptTooLong("long")) == (("take_out", "a"), ("take_out", "b"), ("take_out", "c"), ("edit", ""))
    assert refusal_of(PromptTooLong("long"), [], [], []).ways == (("edit", ""),)
    assert ways(BadOption("x cannot draft for y: its tokenizer differs")) == (("turn_off", "speculative"),)
    assert ways(BadOption("prefix_cache is unavailable")) == (("turn_off", "prefix_cache"),)
    assert ways(StorageError("the disk is full")) == ()


def test_turning_a_plugin_off_asks_again_without_it(page: Any) -> None:
    ui, key = page.handlers.ui, conversation(page, "hi")
    changes = last(page.handlers.turn_off(TAB, event(id="echo"), new_tab(key), *values(page, ("prefix_cache", "echo"))))
    assert changes[card_of(page, "echo").switch] is False and "echo" not in changes[ui.plan]
    stats = messages(page, key)[-1].stats
    assert stats is not None and list(stats["plugins"]) == ["prefix_cache"]


def test_taking_a_document_out_asks_again_without_it(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 4000)
    document, key = page.desk.add_file(path).id, conversation(page)
    page.store.conversations.set_documents(key, [document])
    changes = last(page.handlers.ask(TAB, "What?", new_tab(key, (document,)), *values(page)))
    assert "Take out long.txt" in changes[page.handlers.ui.thread]
    changes = last(page.handlers.take_out(TAB, event(id=document), new_tab(key, (document,)), *values(page)))
    assert messages(page, key)[-1].role == "assistant" and changes[page.handlers.ui.tab]["documents"] == []


def test_refusals_are_escaped() -> None:
    message = Message(1, "k", "user", "hi", None, None, 0.0, Refusal("<b> & more", (("turn_off", '"x>'),)))
    html = thread_html([message], (), {}, "k")
    assert "&lt;b&gt; &amp; more" in html and 'data-id="&quot;x&gt;"' in html


# ---- at once


@pytest.mark.parametrize("how", ["retry", "edit", "ask", "ask a new page"])
def test_two_clicks_at_once_make_one_answer(page: Any, how: str) -> None:
    key = None if how == "ask a new page" else conversation(page, "hi", "old")
    first = messages(page, key)[0].id if key else 0
    page.engine.loader.eos_token_ids = frozenset()  # the answer lasts until all have clicked
    together = Barrier(3)

    def click() -> None:
        calls = {
            "retry": lambda: page.handlers.retry(TAB, NONE, new_tab(key), *values(page)),
            "edit": lambda: page.handlers.edit(TAB, event(id=str(first), text="hey"), new_tab(key), *values(page)),
        }
        together.wait()
        last(calls.get(how, lambda: page.handlers.ask(TAB, "hey", new_tab(key), *values(page, max_tokens=600)))())

    threads = [Thread(target=click) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (only,) = page.store.conversations.list()
    roles = [message.role for message in messages(page, only.id)]
    assert roles == ["user", "assistant"] * (2 if how == "ask" else 1)


def test_a_conversation_that_is_answered_takes_no_other_question(page: Any) -> None:
    answer, (key,) = endless(page), page.handlers.writing
    before = texts(page, key)
    question = messages(page, key)[0]
    for call in (
        page.handlers.retry(OTHER_TAB, NONE, new_tab(key), *values(page)),
        page.handlers.edit(TAB, event(id=str(question.id), text="other"), new_tab(key), *values(page)),
    ):
        changes = last(call)
        assert page.handlers.ui.box not in changes and "live" in changes[page.handlers.ui.live]
        assert texts(page, key) == before
    page.handlers.stop(OTHER_TAB)
    last(answer)
    assert [message.role for message in messages(page, key)] == ["user", "assistant"]


def test_a_question_in_mid_answer_waits_its_turn(page: Any) -> None:
    ui, now = page.handlers.ui, values(page, max_tokens=8)
    answer, (key,) = endless(page), page.handlers.writing
    line = [page.handlers.ask(TAB, text, new_tab(key), *now) for text in ("second", "third", "fourth")]
    assert [next(question)[ui.box] for question in line] == [""] * 3
    shown = page.handlers.open(OTHER_TAB, event(id=key), new_tab(), "")[ui.queue]
    assert shown.index("second") < shown.index("third") < shown.index("fourth")
    assert last(page.handlers.ask(TAB, "fifth", new_tab(key), *now)) == {"__type__": "update"}, "the line is full"
    taken = page.handlers.take_back(OTHER_TAB, event(id=page.handlers.waiting[key][1].key))[ui.queue]
    assert "second" in taken and "third" not in taken, "the line of the tab that takes it back is drawn anew"
    assert "third" not in last(line[1])[ui.queue]
    assert page.handlers.put_back(OTHER_TAB, "") == NOTHING, "it belongs to the tab that asked"
    assert page.handlers.put_back(TAB, "typed")[ui.box] == "typed\n\nthird"
    assert texts(page, key) == ["Go on"]
    page.handlers.stop(TAB)
    last(answer)
    last(line[0])
    changes = last(line[2])
    assert texts(page, key)[::2] == ["Go on", "second", "fourth"] and len(texts(page, key)) == 6
    assert changes[ui.queue] == "" and not page.handlers.waiting


@pytest.mark.parametrize("trouble", ["the conversation was deleted", "the model changes"])
def test_a_question_that_gets_no_turn_returns_to_the_box(page: Any, warnings_shown: list[str], trouble: str) -> None:
    ui, now = page.handlers.ui, values(page, max_tokens=8)
    answer, (key,) = endless(page), page.handlers.writing
    line = [page.handlers.ask(TAB, text, new_tab(key), *now) for text in ("second", "third")]
    assert all(next(question)[ui.box] == "" for question in line)
    page.handlers.stop(TAB)
    last(answer)
    if trouble == "the model changes":
        page.handlers.is_retired = True
    else:
        page.store.conversations.delete(key)
    for question, text, typed, box in (
        (line[0], "second", " ", "second"),
        (line[1], "third", "second", "second\n\nthird"),
    ):
        assert text not in last(question).get(ui.queue, "") and warnings_shown.pop()
        assert page.handlers.put_back(TAB, typed)[ui.box] == box
    assert page.handlers.put_back(TAB, "") == NOTHING, "once"
    assert not page.handlers.waiting and not page.handlers.writing


def test_the_box_is_read_again_when_the_event_that_asks_has_ended(page: Any) -> None:
    ask, put_back = (next(fn for fn in page.blocks.fns.values() if fn.name == name) for name in ("ask", "put_back"))
    box = page.handlers.ui.box
    assert put_back.trigger_after == ask._id and put_back.inputs == [box] == put_back.outputs
    assert not put_back.trigger_only_on_success, "also after an error"


def test_a_bad_value_keeps_a_question_out_of_the_line(page: Any, warnings_shown: list[str]) -> None:
    answer, (key,) = endless(page), page.handlers.writing
    now = values(page)
    assert last(page.handlers.ask(TAB, "second", new_tab(key), *now[:3], "abc", *now[4:])) == NOTHING
    assert "seed" in warnings_shown[-1] and not page.handlers.waiting
    page.handlers.stop(TAB)
    last(answer)


def test_a_waiting_question_has_the_documents_that_were_attached_meanwhile(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    document = page.desk.add_file(path).id
    answer, (key,) = endless(page), page.handlers.writing
    waiting = page.handlers.ask(TAB, "second", new_tab(key), *values(page, max_tokens=8))
    next(waiting)
    page.store.conversations.set_documents(key, [document])
    page.handlers.stop(TAB)
    last(answer)
    assert next(waiting)[page.handlers.ui.tab]["documents"] == [document]
    assert [row.title for row in page.handlers.writing[key].documents] == ["note.txt"]
    last(waiting)


def test_a_waiting_question_is_asked_where_it_was_typed_and_leaves_with_its_tab(page: Any) -> None:
    ui, now = page.handlers.ui, values(page, max_tokens=8)
    answer, (key,) = endless(page), page.handlers.writing
    waiting, closed = (page.handlers.ask(TAB, text, new_tab(key), *now) for text in ("second", "third"))
    next(waiting), next(closed)
    closed.close()
    page.handlers.new(TAB, new_tab(key))
    page.handlers.stop(TAB)
    page.desk.stop((key, "answer"))
    last(answer)
    assert ui.thread not in last(waiting), "the tab shows another conversation"
    assert texts(page, key)[::2] == ["Go on", "second"] and not page.handlers.waiting
    assert page.handlers.shown[TAB.session_hash]["conversation"] is None


# ---- versions


def test_answers_of_a_question_are_versions_and_prompts_follow_the_shown_one(page: Any) -> None:
    ui, now = page.handlers.ui, values(page, max_tokens=8)
    tab = last(page.handlers.ask(TAB, "One", new_tab(), *now))[ui.tab]
    key = tab["conversation"]
    old = messages(page, key)[1]
    changes = last(page.handlers.retry(TAB, NONE, tab, *now))
    new = messages(page, key)[1]
    assert new.versions == (old.id, new.id) and "<span>2/2</span>" in changes[ui.thread]
    changes = page.handlers.version(TAB, event(id=str(old.id)), tab)
    assert messages(page, key)[1].id == old.id and "<span>1/2</span>" in changes[ui.thread]
    asked = list[list[dict[str, str]]]()
    rendered = type(page.engine.tokenizer).render_chat

    def render(tokenizer: Any, turns: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append([dict(turn) for turn in turns])
        return rendered(tokenizer, turns, *args, **kwargs)

    page.store.conversations.extend(key, old.id, "the shown answer", [1], {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(page.engine.tokenizer), "render_chat", render)
        last(page.handlers.ask(TAB, "Two", tab, *now))
    assert asked[0][1]["content"] == "the shown answer"
    question = messages(page, key)[0]
    changes = last(page.handlers.edit(TAB, event(id=str(question.id), text="Uno"), tab, *now))
    assert texts(page, key)[0] == "Uno" and len(texts(page, key)) == 2
    page.handlers.version(TAB, event(id=str(question.id)), tab)
    assert texts(page, key)[0] == "One" and texts(page, key)[2] == "Two", "the old branch is as it was"


def test_no_version_changes_while_a_question_begins(page: Any) -> None:
    key = conversation(page, "hi", "old")
    old = messages(page, key)[1]
    page.store.conversations.branch(key, old.id)
    page.store.conversations.append(key, "assistant", "new")
    change = Thread(target=lambda: page.handlers.version(TAB, event(id=str(old.id)), new_tab(key)))
    with page.handlers.lock:
        change.start()
        change.join(0.1)
        assert texts(page, key) == ["hi", "new"]
    change.join()
    assert texts(page, key) == ["hi", "old"]


def test_versions_wait_for_the_end_of_an_answer(page: Any) -> None:
    answer, (key,) = endless(page), page.handlers.writing
    assert page.handlers.version(TAB, event(id="1"), new_tab(key)) == {"__type__": "update"}
    page.handlers.stop(TAB)
    last(answer)


def test_a_cut_answer_goes_on_with_the_tokens_of_an_answer_that_was_not_cut(page: Any) -> None:
    ui = page.handlers.ui
    page.engine.loader.eos_token_ids = frozenset()
    sampled = ["0.8", *values(page, max_tokens=48)[1:]]
    sampled[3] = "7"
    whole = last(page.handlers.ask(TAB, "Tell me", new_tab(), *sampled))[ui.tab]["conversation"]
    cut = [*sampled[:2], 20, *sampled[3:]]
    changes = last(page.handlers.ask(TAB, "Tell me", new_tab(), *cut))
    tab, key = changes[ui.tab], changes[ui.tab]["conversation"]
    assert 'data-do="go_on"' in changes[ui.thread]
    answer = messages(page, key)[1]
    rest = [*sampled[:2], 28, None, *sampled[4:]]  # the seed of the answer counts
    changes = last(page.handlers.go_on(TAB, event(id=str(answer.id)), tab, *rest))
    (_, now), (_, uncut) = messages(page, key), messages(page, whole)
    assert now.id == answer.id and now.token_ids == uncut.token_ids and now.text == uncut.text
    assert now.stats is not None and now.stats["continued_after"] == 20
    assert "continued after <b>20</b> tokens" in changes[ui.thread]


def test_a_continued_answer_has_the_plugins_of_both_parts_and_the_weaker_exactness() -> None:
    before = {"plugins": {"jacobi": {"window": 3}, "int8": {}}, "exactness": "approximate", "batch_invariant": True}
    after = {"plugins": {"prompt_lookup": {}, "jacobi": {"window": 6}}, "exactness": "identical"}
    both = plan_of_both(before, after)
    assert list(both["plugins"]) == ["prompt_lookup", "jacobi", "int8"], "the drafter of the later part comes first"
    assert both["plugins"]["jacobi"] == {"window": 6} and both["batch_invariant"] is True
    assert both["exactness"] == plan_of_both(after, before)["exactness"] == "approximate"
    assert plan_of_both({}, {**after, "batch_invariant": False})["batch_invariant"] is False


def test_a_continued_answer_names_the_plugins_of_its_first_part(page: Any) -> None:
    ui = page.handlers.ui
    page.engine.loader.eos_token_ids = frozenset()
    tab = last(page.handlers.ask(TAB, "Tell me", new_tab(), *values(page, ("echo",), 8)))[ui.tab]
    answer = messages(page, tab["conversation"])[1]
    last(page.handlers.go_on(TAB, event(id=str(answer.id)), tab, *values(page, ("prefix_cache",), 8)))
    continued = messages(page, tab["conversation"])[1].stats
    assert continued is not None and set(continued["plugins"]) == {"echo", "prefix_cache"}


def test_only_the_last_answer_of_this_model_can_go_on(page: Any, warnings_shown: list[str]) -> None:
    key = conversation(page, "hi", "old")
    answer = messages(page, key)[1]
    assert 'data-do="go_on"' not in thread_html(messages(page, key), (), {}, key, model="m")
    own, other = {"model": page.engine.loader.source.name}, {"model": "another"}
    for ending in ({"finish_reason": "stop", **own}, {"finish_reason": "length", **other}):
        page.store.conversations.extend(key, answer.id, "old", [1, 2], stats(**ending))
        last(page.handlers.go_on(TAB, event(id=str(answer.id)), new_tab(key), *values(page)))
        assert "cannot be continued any more" in warnings_shown.pop()
    assert texts(page, key) == ["hi", "old"]


def over(page: Any, key: str) -> None:
    """Ask for frames of an answer until it is over, as page.js does."""
    frame, deadline = page.handlers.frame(key, "other", 0), time.monotonic() + 20
    while "over" not in frame:
        assert time.monotonic() < deadline, "the answer does not end"
        time.sleep(0.005)
        frame = page.handlers.frame(key, "other", frame["number"])


def test_a_tab_that_shows_the_answer_of_another_tab_follows_it_to_its_end(page: Any) -> None:
    ui = page.handlers.ui
    answer, (key,) = endless(page), page.handlers.writing
    writing = page.handlers.writing[key]
    opened = page.handlers.open(OTHER_TAB, event(id=key), new_tab(), "")
    assert writing.key in opened[ui.live] and "live" in page.handlers.settle(OTHER_TAB, new_tab(key))[ui.live]
    assert "over" not in page.handlers.frame(writing.key, "other", 0)
    page.handlers.stop(TAB)
    finish = Thread(target=lambda: last(answer))
    finish.start()
    over(page, writing.key)
    finish.join()
    settled = page.handlers.settle(OTHER_TAB, new_tab(key))
    assert settled[ui.live] == "" and "stopped" in settled[ui.thread]
    assert page.handlers.settle(OTHER_TAB, new_tab(key)) == {"__type__": "update"}, "once"


def test_a_tab_that_follows_draws_the_question_that_waited(page: Any) -> None:
    ui = page.handlers.ui
    answer, (key,) = endless(page), page.handlers.writing
    first = page.handlers.writing[key]
    waiting = page.handlers.ask(TAB, "second", new_tab(key), *values(page, max_tokens=4000))
    next(waiting)
    page.handlers.open(OTHER_TAB, event(id=key), new_tab(), "")
    page.handlers.stop(TAB)
    finish = Thread(target=lambda: last(answer))
    finish.start()
    begun = next(changes for changes in waiting if ui.thread in changes)
    assert "second" in begun[ui.thread], "the next answer has begun"
    assert page.handlers.frame(first.key, "other", 0) == {"over": True}, "its frames belong to another answer"
    finish.join()
    settled = page.handlers.settle(OTHER_TAB, new_tab("an older state of the tab"))
    assert "second" in settled[ui.thread] and page.handlers.writing[key].key in settled[ui.live]
    assert settled[ui.queue] == ""
    page.handlers.stop(TAB)
    last(waiting)


def test_an_answer_stays_with_its_conversation_when_the_tab_leaves(page: Any) -> None:
    ui, other = page.handlers.ui, conversation(page, "hi", "hello")
    answer, (key,) = endless(page), page.handlers.writing
    for changes in (
        page.handlers.open(TAB, event(id=other), new_tab(key), ""),
        page.handlers.new(TAB, new_tab(key)),
    ):
        assert changes[ui.live] == "" and changes[ui.stop].visible == "hidden"
    back = page.handlers.open(TAB, event(id=key), new_tab(), "")
    assert "live" in back[ui.live] and "Go on" in back[ui.thread] and back[ui.stop].visible is True
    page.handlers.new(TAB, new_tab(key))
    page.desk.stop((key, "answer"))
    changes = last(answer)
    assert ui.thread not in changes and ui.tab not in changes, "its end does not pull the tab back"
    assert messages(page, key)[-1].role == "assistant"


def test_a_new_question_runs_beside_an_answer_of_another_conversation(page: Any) -> None:
    answer, (first,) = endless(page), page.handlers.writing
    page.handlers.new(TAB, new_tab(first))
    changes = last(page.handlers.ask(TAB, "Hello", new_tab(), *values(page)))
    second = changes[page.handlers.ui.tab]["conversation"]
    assert second != first and [message.role for message in messages(page, second)] == ["user", "assistant"]
    assert first in page.handlers.writing
    page.desk.stop((first, "answer"))
    last(answer)


# ---- stop


def test_a_stop_while_weights_load_is_not_forgotten(page: Any) -> None:
    key = conversation(page, "hi")
    answer = page.desk.answer(("t", "answer"), key, Ask({}, Sampling({"max_tokens": 400, "ignore_eos": True})))
    next(answer)  # "loading": the page shows its stop button from here on
    page.desk.stop(("t", "answer"))
    *_, live = answer
    assert live.result.finish_reason == "aborted"


def test_a_stop_before_the_first_token_keeps_the_old_answer(page: Any) -> None:
    key = conversation(page, "hi", "old")
    answer = page.handlers.retry(TAB, NONE, new_tab(key), *values(page, max_tokens=400))
    next(answer)  # not yet with the engine
    page.handlers.stop(TAB)
    changes = last(answer)
    assert texts(page, key) == ["hi", "old"]
    assert "it was stopped before its first token" in changes[page.handlers.ui.thread]


def test_a_stop_ends_the_reading_of_a_prompt(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = page.engine.lane_of(page.engine.plan({"prefix_cache": {}})).scheduler
    monkeypatch.setattr(scheduler, "max_step_tokens", 16)
    schedule, num_steps, stopped = type(scheduler).schedule, 0, Event()

    def third_step_waits(own: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            assert stopped.wait(20)
        return schedule(own)

    monkeypatch.setattr(type(scheduler), "schedule", third_step_waits)
    answer = page.handlers.ask(TAB, "w" * 400, new_tab(), *values(page))
    next(answer)

    def stop() -> None:
        while not page.handlers.writing or not next(iter(page.handlers.writing.values())).live.done:
            time.sleep(0.005)
        page.handlers.stop(TAB)
        stopped.set()

    stopping = Thread(target=stop)
    stopping.start()
    changes = last(answer)
    stopping.join()
    assert "it was stopped before its first token" in changes[page.handlers.ui.thread]
    assert num_steps <= 4, "the other 20 steps of the prompt were not computed"


# ---- elsewhere


def test_a_conversation_that_is_deleted_in_mid_answer_ends_on_an_empty_page(
    page: Any, warnings_shown: list[str]
) -> None:
    answer, (key,) = endless(page), page.handlers.writing
    page.store.conversations.delete(key)  # by another process
    page.handlers.stop(TAB)
    changes = last(answer)
    assert changes[page.handlers.ui.tab] == new_tab() and "empty" in changes[page.handlers.ui.thread]
    assert len(warnings_shown) == 1 and key in warnings_shown[0]


def test_removing_a_conversation_stops_its_answer(page: Any, warnings_shown: list[str]) -> None:
    answer, (key,) = endless(page), page.handlers.writing
    changes = page.handlers.remove(TAB, event(id=key), new_tab(key), "")
    assert changes[page.handlers.ui.tab] == new_tab()
    assert page.handlers.ui.thread not in last(answer)
    deadline = time.monotonic() + 5
    while page.engine.roster.seqs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not page.engine.roster.seqs


def test_a_document_that_is_removed_elsewhere_holds_nothing_up(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    tab = last(page.handlers.upload(TAB, [str(path)], new_tab(), *values(page)))[page.handlers.ui.tab]
    page.store.documents.remove(tab["documents"][0])
    changes = last(page.handlers.ask(TAB, "What?", tab, *values(page)))
    (only,) = page.store.conversations.list()
    assert [message.role for message in messages(page, only.id)] == ["user", "assistant"]
    assert changes[page.handlers.ui.tab]["documents"] == []


def test_the_title_follows_the_first_question_until_it_is_given_by_hand(page: Any) -> None:
    key = conversation(page, "one", "1")

    def edit(text: str) -> dict[Any, Any]:
        first = event(id=str(messages(page, key)[0].id), text=text)
        return last(page.handlers.edit(TAB, first, new_tab(key), *values(page)))

    changes = edit("two")
    assert page.store.conversations.get(key).title == "two" and ">two</span>" in changes[page.handlers.ui.conversations]
    page.store.conversations.rename(key, "mine")
    edit("three")
    assert page.store.conversations.get(key).title == "mine"
