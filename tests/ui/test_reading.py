"""A document longer than the context: refused with a way out, or read page by page under attention sinks, and stopped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pitlane import PromptTooLong, Segment
from pitlane.storage.db import Store
from pitlane.storage.types import Document, Page
from pitlane.ui.answering import Desk
from pitlane.ui.ask import Ask
from pitlane.ui.cli import main
from pitlane.ui.panels import live_html
from pitlane.ui.reading import page_read, page_text
from pitlane.ui.refusals import refusal_of
from pitlane.ui.sampling import Sampling

SINKS = {"attention_sinks": {"num_sinks": 4, "window": 64, "stride": 32}}
KEY = ("tab", "answer")


def book(*lengths: int) -> Document:
    pages = tuple(Page(index, str(index + 1), "word " * (length // 5)) for index, length in enumerate(lengths))
    return Document("book.txt", "text/plain", pages, hashlib.sha256(repr(lengths).encode()).hexdigest())


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


def conversation(store: Store, document: Document) -> str:
    stored = store.documents.add(document)
    key = store.conversations.create("random:tiny").id
    store.conversations.set_documents(key, [stored.id])
    store.conversations.append(key, "user", "What is it about?")
    return key


def test_the_page_follows_from_the_share_of_computed_tokens() -> None:
    document, other = book(100, 300, 600), book(50)
    segments = [Segment(10, 110, document.content_hash, ""), Segment(120, 130, other.content_hash, "")]
    places = {done: page_read([other, document], segments, done) for done in (10, 11, 20, 21, 50, 51, 110, 111, 125)}
    assert places == {
        **dict.fromkeys((11, 20), (1, 3)),
        **dict.fromkeys((21, 50), (2, 3)),
        **dict.fromkeys((51, 110), (3, 3)),
        **dict.fromkeys((10, 111, 125)),  # before and behind the document; a document of one page has no number
    }
    assert page_text((2, 1300)) == "page 2 of 1,300" and page_text(None) == ""


def test_a_long_document_is_refused_or_read_page_by_page(make_engine: Any, store: Store) -> None:
    engine = make_engine(context=1200, max_step_tokens=64)
    document = book(*[400] * 5)
    desk, key = Desk(engine, store), conversation(store, document)
    with pytest.raises(PromptTooLong, match="or turn on attention_sinks, which drops the middle") as caught:
        list(desk.answer(KEY, key, Ask({}, Sampling({"max_tokens": 3}))))
    assert refusal_of(caught.value, [], [], []).ways[0] == ("turn_on", "attention_sinks")
    pages: list[int] = []
    for live in desk.answer(KEY, key, Ask(SINKS, Sampling({"max_tokens": 3}))):
        shown = re.search(r"page (\d) of 5 · ", live_html(live, [document]))
        pages += [int(shown[1])] if shown else []
    assert sorted(set(pages)) == [1, 2, 3, 4, 5] and pages == sorted(pages)
    assert live.result is not None and live.result.finish_reason in ("length", "stop")
    assert live.result.stats["notes"]["attention_sinks"]["dropped_tokens"] > 1200


def test_a_stop_while_a_long_document_is_read_leaves_nothing(make_engine: Any, store: Store) -> None:
    engine = make_engine(context=1200, max_step_tokens=64)
    desk, key = Desk(engine, store), conversation(store, book(*[400] * 5))
    answer = desk.answer(KEY, key, Ask(SINKS, Sampling({"max_tokens": 3})))
    last = None
    for live in answer:
        if live.done and last is None:
            desk.stop(KEY)
        last = live.done or last
    result = live.result
    assert last is not None and last < live.total / 2, "the rest of the document is not read"
    assert result is not None and result.finish_reason == "aborted" and not result.token_ids
    assert [message.role for message in store.conversations.get(key).messages] == ["user"]
    engine.worker.call(lambda: None).result()
    pool = engine.lane_of(engine.plan(SINKS)).pool
    assert pool.num_free_blocks == pool.num_blocks


def test_the_command_line_reads_a_long_document_and_names_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("Some words of a page. " * 180)
    words: list[str] = []

    class Bar:
        task_ids = (0,)

        def update(self, task: int, description: str, completed: int, total: int) -> None:
            words.append(description)

        def stop(self) -> None: ...

    monkeypatch.setattr("pitlane.ui.render._bar", lambda label, total: Bar())
    monkeypatch.setattr("pitlane.ui.render._shows_bars", lambda: True)
    asked = ("--doc", str(file), "-m", "random:tiny", "--max-tokens", "2", "--context", "1200", "What is it?")
    refused = CliRunner().invoke(main, ["run", *asked])
    assert refused.exit_code == 2 and "turn on attention_sinks" in refused.stderr
    sinks = ["--plugins", "attention_sinks", "-o", "attention_sinks.window=64", "-o", "attention_sinks.stride=32"]
    read = CliRunner().invoke(main, ["run", *sinks, *asked])
    assert read.exit_code == 0 and "attention_sinks dropped tokens" in read.stderr, read.stderr
    assert any(re.fullmatch(r"Reading the prompt, page [12] of 2", text) for text in words), words
