"""Documents in the store: text by page. A document is named by its title or by the hash of its file."""

from __future__ import annotations

import builtins
import time
from typing import TYPE_CHECKING, Any

from pitlane.storage.errors import NotFound, StorageError
from pitlane.storage.types import Document, Page, StoredDocument, storable

if TYPE_CHECKING:
    from pitlane.storage.prefixes import Prefixes
    from pitlane.storage.sqlite_file import SqliteFile

_MIN_ID_PREFIX = 4


class Documents:
    """Add, find, read and remove documents."""

    def __init__(self, file: SqliteFile, prefixes: Prefixes) -> None:
        self._file, self._prefixes = file, prefixes

    def add(self, document: Document) -> StoredDocument:
        """Store a document. If the same file is stored already, return its row unchanged, title included."""
        key = document.content_hash[:12]
        pages = [(key, page.index, storable(page.label), storable(page.text)) for page in document.pages]
        with self._file.transaction() as db:
            stored = self._where("id = ?", key)
            if stored:
                if stored[0].content_hash != document.content_hash:
                    raise StorageError(f"another document has the id {key} ('{stored[0].title}'); remove it first")
                return stored[0]
            row = (key, storable(document.title), document.mime, document.content_hash)
            sizes = (len(pages), document.num_chars, time.time())
            db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)", row + sizes)
            db.conn.executemany("INSERT INTO document_pages VALUES (?, ?, ?, ?)", pages)
            return self._where("id = ?", key)[0]

    def get(self, name: str) -> StoredDocument:
        """Find a document by its id, its title, or the beginning of either (of an id, at least 4 digits).

        Raises StorageError if several documents match, NotFound if none does.
        """
        stored, name = self.list(), storable(name)
        folded = name.casefold()
        for matches in (
            [row for row in stored if row.id == folded],
            [row for row in stored if row.title == name],
            [row for row in stored if len(folded) >= _MIN_ID_PREFIX and row.id.startswith(folded)],
            [row for row in stored if folded and row.title.casefold().startswith(folded)],
        ):
            if len(matches) > 1:
                choice = ", ".join(f"{row.id} ({row.title})" for row in matches)
                raise StorageError(f"'{name}' names several documents: {choice}; use an id")
            if matches:
                return matches[0]
        known = ", ".join(f"{row.id} ({row.title})" for row in stored[:20]) or "none"
        raise NotFound(f"no document '{name}'; stored are: {known}")

    def load(self, name: str) -> Document:
        """Return a stored document with its pages."""
        stored = self.get(name)
        rows = self._file.rows(
            "SELECT page_index, label, text FROM document_pages WHERE document_id = ? ORDER BY page_index", (stored.id,)
        )
        pages = tuple(Page(row["page_index"], row["label"], row["text"]) for row in rows)
        return Document(stored.title, stored.mime, pages, stored.content_hash)

    def list(self) -> builtins.list[StoredDocument]:
        """Return all documents, newest first."""
        return self._where("1")

    def remove(self, name: str) -> None:
        """Remove a document and its saved prefixes."""
        stored = self.get(name)
        with self._file.transaction() as db:
            self._prefixes.remove_document(stored.content_hash)
            db.execute("DELETE FROM documents WHERE id = ?", (stored.id,))

    def _where(self, condition: str, *parameters: Any) -> builtins.list[StoredDocument]:
        sql = f"SELECT * FROM documents WHERE {condition} ORDER BY created DESC, rowid DESC"
        return [StoredDocument(**row) for row in self._file.rows(sql, parameters)]
