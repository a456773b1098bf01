"""Conversations and runs in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pitlane.storage.conversation_rows import turns
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound
from pitlane.storage.types import Document, Page, Refusal, UnfinishedAnswer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "pitlane.db") as opened:
        yield opened


def test_append_and_get(store: Store) -> None:
    made = store.conversations.create("bundled")
    store.conversations.append(made.id, "user", "What is\n a pit  lane?")
    answer = store.conversations.append(made.id, "assistant", "A lane.", token_ids=[1, 2, 300], stats={"steps": 3})
    conversation = store.conversations.get(made.id)
    assert (conversation.title, conversation.num_messages, conversation.model) == ("What is a pit lane?", 2, "bundled")
    assert conversation.messages[1] == answer
    assert (answer.token_ids, answer.stats) == ((1, 2, 300), {"steps": 3})
    assert conversation.messages[0].token_ids is None


def test_an_unfinished_answer_is_kept_without_a_copy_of_its_tokens(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.conversations.create("bundled").id
    answer = UnfinishedAnswer(key, "writer", "Half", (1, 2, 300), {"steps": 3}, question="Why?", continued=4)
    monkeypatch.setattr("copy.deepcopy", lambda *_: pytest.fail("copied"))
    store.unfinished.keep(answer)
    assert store.unfinished.list() == [answer]


def test_default_title_is_the_first_words_only(store: Store) -> None:
    key = store.conversations.create("bundled").id
    store.conversations.append(key, "system", "You are terse.")
    assert store.conversations.get(key).title == ""
    store.conversations.append(key, "user", "word " * 100)
    store.conversations.append(key, "user", "another")
    title = store.conversations.get(key).title
    assert title.endswith("word…") and len(title) <= 61
    named = store.conversations.create("bundled", "mine").id
    store.conversations.append(named, "user", "hello")
    assert store.conversations.get(named).title == "mine"


def test_list_is_newest_first_and_limited(store: Store) -> None:
    keys = [store.conversations.create("m", f"c{number}").id for number in range(4)]
    store.conversations.append(keys[0], "user", "again")
    assert [row.id for row in store.conversations.list()] == [keys[0], keys[3], keys[2], keys[1]]
    assert [row.id for row in store.conversations.list(limit=1)] == [keys[0]]
    assert store.conversations.list()[0].num_messages == 1


def test_truncate_removes_a_message_and_all_later(store: Store) -> None:
    key = store.conversations.create("m").id
    ids = [store.conversations.append(key, "user", str(number)).id for number in range(5)]
    store.conversations.truncate(key, ids[2])
    assert [message.text for message in store.conversations.get(key).messages] == ["0", "1"]
    later = store.conversations.append(key, "user", "new")
    assert later.id > ids[4], "an id that another window still holds was given again"
    with pytest.raises(NotFound, match=f"no message {ids[3]}"):
        store.conversations.truncate(key, ids[3])
    other = store.conversations.create("m").id
    with pytest.raises(NotFound):
        store.conversations.truncate(other, later.id)


def test_truncating_the_first_question_clears_the_title_that_it_gave(store: Store) -> None:
    key = store.conversations.create("m").id
    ids = [store.conversations.append(key, role, role).id for role in ("user", "assistant", "user")]
    store.conversations.truncate(key, ids[2])
    assert store.conversations.get(key).title == "user"
    store.conversations.truncate(key, ids[0])
    assert store.conversations.get(key).title == ""
    named = store.conversations.create("m", "mine").id
    store.conversations.truncate(named, store.conversations.append(named, "user", "x").id)
    assert store.conversations.get(named).title == "mine"


def texts(store: Store, key: str) -> list[str]:
    return [message.text for message in store.conversations.get(key).messages]


def test_versions_of_an_answer_keep_what_followed_them(tmp_path: Path) -> None:
    path = tmp_path / "versions.db"
    with Store(path) as store:
        add, key = store.conversations.append, store.conversations.create("m").id
        add(key, "user", "q")
        first = add(key, "assistant", "a1")
        add(key, "user", "more")
        add(key, "assistant", "b")
        store.conversations.branch(key, first.id)
        assert texts(store, key) == ["q"]
        second = add(key, "assistant", "a2", stats={"steps": 1})
        assert texts(store, key) == ["q", "a2"] and store.conversations.list()[0].num_messages == 2
        assert store.conversations.get(key).messages[1].versions == (first.id, second.id)
        assert store.conversations.get(key).messages[0].versions == ()
    with Store(path) as store:
        store.conversations.show_version(key, first.id)
        assert texts(store, key) == ["q", "a1", "more", "b"] and store.conversations.list()[0].num_messages == 4
        with pytest.raises(NotFound, match="has no message"):
            store.conversations.branch(key, second.id)  # hidden
        with pytest.raises(NotFound, match="has no message"):
            store.conversations.show_version(key, 999)
        store.conversations.truncate(key, first.id)
        assert texts(store, key) == ["q"]
        third = store.conversations.append(key, "assistant", "a3")
        assert store.conversations.get(key).messages[1].versions == (second.id, third.id)


def test_an_edited_first_question_gives_the_title_and_takes_it_along(store: Store) -> None:
    key = store.conversations.create("m").id
    first = store.conversations.append(key, "user", "one")
    store.conversations.append(key, "assistant", "1")
    store.conversations.branch(key, first.id)
    second = store.conversations.append(key, "user", "two")
    assert store.conversations.get(key).title == "two"
    store.conversations.show_version(key, first.id)
    assert store.conversations.get(key).title == "one" and texts(store, key) == ["one", "1"]
    store.conversations.rename(key, "mine")
    store.conversations.show_version(key, second.id)
    assert store.conversations.get(key).title == "mine" and texts(store, key) == ["two"]


def test_a_continued_answer_is_one_message_and_found_by_its_new_words(store: Store) -> None:
    key = store.conversations.create("m").id
    store.conversations.append(key, "user", "q")
    answer = store.conversations.append(key, "assistant", "the lane", token_ids=[1, 2], stats={"steps": 2})
    store.conversations.refuse(key, answer.id, Refusal("too long"))
    store.conversations.extend(key, answer.id, "the lane ends", [1, 2, 3], {"steps": 1})
    message = store.conversations.get(key).messages[1]
    assert (message.id, message.text, message.token_ids, message.stats, message.refusal) == (
        answer.id, "the lane ends", (1, 2, 3), {"steps": 1}, None,
    )  # fmt: skip
    assert [hit.message_id for hit in store.conversations.search("ends")] == [answer.id]
    with pytest.raises(NotFound):
        store.conversations.extend("other", answer.id, "x", [], {})


def test_a_refusal_is_kept_with_its_message(store: Store) -> None:
    key = store.conversations.create("m").id
    message = store.conversations.append(key, "user", "x")
    refusal = Refusal("too long\ud800", (("take_out", "abc"),))
    store.conversations.refuse(key, message.id, refusal)
    assert store.conversations.get(key).messages[0].refusal == Refusal("too long?", refusal.ways)
    with pytest.raises(NotFound):
        store.conversations.refuse("other", message.id, refusal)


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("", ""),
        ("u", "u"),
        ("ua", "ua"),
        ("uau", "uau"),
        ("uuau", "uau"),
        ("uauu", "uau"),
        ("uuu", "u"),
        ("aua", "aua"),
        ("uaua", "uaua"),
    ],
)
def test_a_prompt_leaves_earlier_questions_without_an_answer_out(store: Store, roles: str, kept: str) -> None:
    names = {"u": "user", "a": "assistant"}
    key = store.conversations.create("m").id
    for number, role in enumerate(roles):
        store.conversations.append(key, names[role], str(number))
    kept_turns = turns(store.conversations.get(key).messages)
    assert [turn["role"] for turn in kept_turns] == [names[role] for role in kept]
    assert not roles or kept_turns[-1]["content"] == str(len(roles) - 1)


def test_rename_and_delete(store: Store) -> None:
    key = store.conversations.create("m").id
    store.conversations.append(key, "user", "vanishing words")
    store.conversations.rename(key, "kept")
    assert store.conversations.get(key).title == "kept"
    store.conversations.delete(key)
    assert store.conversations.search("vanishing") == []
    for call in (store.conversations.get, store.conversations.delete):
        with pytest.raises(NotFound, match=key):
            call(key)
    with pytest.raises(NotFound):
        store.conversations.append(key, "user", "x")


def test_set_documents_keeps_order_and_refuses_unknown(store: Store) -> None:
    ids = [
        store.documents.add(Document(name, "text/plain", (Page(0, "1", "x"),), name * 64)).id
        for name in ("a", "b", "c")
    ]
    key = store.conversations.create("m").id
    store.conversations.set_documents(key, [ids[2], ids[0], ids[2]])
    assert store.conversations.get(key).document_ids == (ids[2], ids[0])
    with pytest.raises(NotFound, match="nope"):
        store.conversations.set_documents(key, [ids[1], "nope"])
    assert store.conversations.get(key).document_ids == (ids[2], ids[0])
    store.conversations.set_documents(key, [ids[1], "nope"], leave_out_removed=True)
    assert store.conversations.get(key).document_ids == (ids[1],)


def test_search_finds_words_beginnings_titles_and_characters(store: Store) -> None:
    key = store.conversations.create("m", "Espresso notes").id
    message = store.conversations.append(key, "user", "The portafilter is warm and naïve. C++ 说中文字 100%")
    for text in ("portafilter", "PORTA", "warm portaf", "naive", "中文", "C++", "100%"):
        hits = store.conversations.search(text)
        assert [hit.message_id for hit in hits] == [message.id], text
        assert hits[0].conversation_id == key and hits[0].snippet
    assert "[portafilter]" in store.conversations.search("portafilter")[0].snippet
    (by_title,) = store.conversations.search("espresso")
    assert by_title.message_id is None
    assert store.conversations.search("absent") == []


def test_search_finds_shown_messages_alone(store: Store) -> None:
    add, key = store.conversations.append, store.conversations.create("m", "t").id
    question = add(key, "user", "portafilter \u8bf4\u4e2d\u6587")
    add(key, "assistant", "group head")
    store.conversations.branch(key, question.id)
    edited = add(key, "user", "tamper")
    for text in ("portafilter", "group", "\u4e2d\u6587"):
        assert store.conversations.search(text) == [], text
    assert [hit.message_id for hit in store.conversations.search("tamper")] == [edited.id]
    store.conversations.show_version(key, question.id)
    assert len(store.conversations.search("group")) == 1 and store.conversations.search("tamper") == []


ODD = [
    '"',
    "'",
    "*",
    "AND",
    "NOT",
    "a OR",
    "NEAR(",
    "(",
    ")",
    "a:b",
    "-x",
    "^",
    "{x}",
    "\0",
    "\ud800",
    "%",
    "_",
    "\\",
    "+ +",
]


@pytest.mark.parametrize("text", [*ODD, "", "  ", '"unbalanced', 'a"b"c', "text:", "rank", "a" * 10_000, "🏎"])
def test_search_takes_any_text(store: Store, text: str) -> None:
    key = store.conversations.create("m").id
    store.conversations.append(key, "user", "quick brown fox")
    assert store.conversations.search(text) == []


def test_runs(store: Store) -> None:
    ids = [store.runs.add({"model": "bundled", "tokens_per_second": 1.5 * number}) for number in range(3)]
    assert [run.id for run in store.runs.list()] == ids[::-1]
    assert [run.id for run in store.runs.list(1)] == ids[2:]
    assert store.runs.get(ids[1]).stats == {"model": "bundled", "tokens_per_second": 1.5}
    with pytest.raises(NotFound, match="no run 99"):
        store.runs.get(99)
