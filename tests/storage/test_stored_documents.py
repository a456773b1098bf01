"""Documents in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, StorageError
from pitlane.storage.types import Document, Page

PAGES = (Page(0, "i", "first"), Page(1, "1", "second ü 中"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "pitlane.db") as opened:
        yield opened


def document(title: str, content_hash: str) -> Document:
    return Document(title, "application/pdf", PAGES, content_hash.ljust(64, "0"))


def test_add_get_load(store: Store) -> None:
    given = document("report.pdf", "abcdef123456")
    stored = store.documents.add(given)
    assert (stored.id, stored.title, stored.num_pages, stored.num_chars) == ("abcdef123456", "report.pdf", 2, 15)
    assert store.documents.load(stored.id) == given
    assert store.documents.load(stored.id).text == given.text
    for name in ("abcdef123456", "abcd", "report.pdf", "rep", "REPORT"):
        assert store.documents.get(name) == stored


def test_the_same_bytes_twice_are_one_row(store: Store) -> None:
    first = store.documents.add(document("a.pdf", "aa"))
    assert store.documents.add(document("copy of a.pdf", "aa")) == first
    assert store.documents.list() == [first]


def test_other_bytes_of_the_same_id_are_refused(store: Store) -> None:
    store.documents.add(document("a.pdf", "a" * 12 + "1"))
    with pytest.raises(StorageError, match=r"has the id aaaaaaaaaaaa \('a.pdf'\)"):
        store.documents.add(document("b.pdf", "a" * 12 + "2"))


def test_unknown_and_ambiguous_names_list_the_choice(store: Store) -> None:
    with pytest.raises(NotFound, match="stored are: none"):
        store.documents.get("x")
    store.documents.add(document("report 1.pdf", "aaaa1"))
    store.documents.add(document("report 2.pdf", "aaaa2"))
    for name in ("report", "aaaa"):
        with pytest.raises(StorageError, match=r"several documents: .*report [12].*report [12].*use an id"):
            store.documents.get(name)
    with pytest.raises(NotFound, match=r"report 1\.pdf"):
        store.documents.get("")


def test_remove(store: Store) -> None:
    stored = store.documents.add(document("a.pdf", "aa"))
    key = store.conversations.create("bundled").id
    store.conversations.set_documents(key, [stored.id])
    store.documents.remove("a.pdf")
    assert store.documents.list() == []
    assert store.conversations.get(key).document_ids == ()
    assert store.rows("SELECT * FROM document_pages") == []
    with pytest.raises(NotFound):
        store.documents.remove("a.pdf")


def test_lone_surrogates_and_nul_are_stored_as_text(store: Store) -> None:
    given = Document("a\ud800", "text/plain", (Page(0, "1", "x\0y\udfff"),), "bb".ljust(64, "0"))
    stored = store.documents.add(given)
    assert store.documents.load(stored.id).pages[0].text == "xy?"
