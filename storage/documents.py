"""Documents in the store: text by page, named by their title or by the hash of the file they came from."""

from __future__ import annotations

import builtins
import time
from typing import TYPE_CHECKING, Any

from pitlane.storage.errors import NotFound, StorageError
from pitlane.storage.types import Document, Page, StoredDocument, storable

if TYPE_CHECKING:
    from pitlane.storage.db import Store

_MIN_ID_PREFIX = 4


class Documents:
    """Add, find, read and remove documents."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, document: Document) -> StoredDocument:
        """Store a document; the same bytes twice give the row of the first time, title included."""
        key = document.content_hash[:12]
        pages = [(key, page.index, storable(page.label), storable(page.text)) for page in document.pages]
        with self._store.transaction() as db:
            known = self._where("id = ?", key)
            if known:
                if known[0].content_hash != document.content_hash:
                    raise StorageError(f"another document has the id {key} ('{known[0].title}'); remove that one first")
                return known[0]
            row = (key, storable(document.title), document.mime, document.content_hash)
            sizes = (len(pages), document.num_chars, time.time())
            db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)", row + sizes)
            db.conn.executemany("INSERT INTO document_pages VALUES (?, ?, ?, ?)", pages)
            return self._where("id = ?", key)[0]

    def get(self, name: str) -> StoredDocument:
        """Find by id, by title, or by the beginning of either (ids from 4 digits); refuse what fits several."""
        stored, name = self.list(), storable(name)
        wanted = name.casefold()
        for fits in (
            [row for row in stored if row.id == wanted],
            [row for row in stored if row.title == name],
            [row for row in stored if len(wanted) >= _MIN_ID_PREFIX and row.id.startswith(wanted)],
            [row for row in stored if wanted and row.title.casefold().startswith(wanted)],
        ):
            if len(fits) > 1:
                choice = ", ".join(f"{row.id} ({row.title})" for row in fits)
                raise StorageError(f"'{name}' names several documents: {choice}; use an id")
            if fits:
                return fits[0]
        known = ", ".join(f"{row.id} ({row.title})" for row in stored[:20]) or "none"
        raise NotFound(f"no document '{name}'; stored are: {known}")

    def load(self, name: str) -> Document:
        """Return a stored document with its pages, as it was added."""
        stored = self.get(name)
        rows = self._store.rows(
            "SELECT page_index, label, text FROM document_pages WHERE document_id = ? ORDER BY page_index", (stored.id,)
        )
        pages = tuple(Page(row["page_index"], row["label"], row["text"]) for row in rows)
        return Document(stored.title, stored.mime, pages, stored.content_hash)

    def list(self) -> builtins.list[StoredDocument]:
        """All documents, newest first."""
        return self._where("1")

    def remove(self, name: str) -> None:
        """Remove a document and the prefixes that were saved for it."""
        stored = self.get(name)
        with self._store.transaction() as db:
            self._store.prefixes.remove_document(stored.content_hash)
            db.execute("DELETE FROM documents WHERE id = ?", (stored.id,))

    def _where(self, condition: str, *parameters: Any) -> builtins.list[StoredDocument]:
        sql = f"SELECT * FROM documents WHERE {condition} ORDER BY created DESC, rowid DESC"
        return [StoredDocument(**row) for row in self._store.rows(sql, parameters)]
