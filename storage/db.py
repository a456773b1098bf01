"""The store: one SQLite file for documents, saved prefixes, conversations, runs and comparisons."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pitlane.storage.comparisons import Comparisons
from pitlane.storage.conversations import Conversations
from pitlane.storage.documents import Documents
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home
from pitlane.storage.prefixes import Prefixes
from pitlane.storage.runs import Runs
from pitlane.storage.sqlite_file import SqliteFile
from pitlane.storage.unfinished import Unfinished


class Store(SqliteFile):
    """All stored data of Pitlane. Several threads and processes may use it at the same time."""

    def __init__(self, path: Path | None = None, *, quota_bytes: int | None = None) -> None:
        """Open or create the database at `path` (default: pitlane.db in the data folder); prefixes lie beside it.

        quota_bytes: prune prefixes to this size now and before each save. None: prune to the default quota, on saves only.
        """
        super().__init__((path if path is not None else home() / "pitlane.db").absolute())
        # Opening deletes files without a row, so two databases must not share a folder.
        folder = "prefixes" if self.path.name == "pitlane.db" else f"{self.path.stem}-prefixes"
        try:
            self.prefixes = Prefixes(self, self.path.parent / folder, quota_bytes=quota_bytes)
            self.documents = Documents(self, self.prefixes)
            self.conversations = Conversations(self, self.documents)
            self.runs = Runs(self)
            self.comparisons = Comparisons(self)
            self.unfinished = Unfinished(self)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Write the pending dates of last use and close the file. May be called twice."""
        with self._lock:
            with suppress(StorageError, sqlite3.ProgrammingError):  # closed already, or only dates of last use are lost
                self.prefixes.flush()
            super().close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
