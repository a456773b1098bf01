"""Stores answers while they are being written. If the process is killed, the stored part of the answer survives.

A conversation has at most one row. The writer replaces the row while the answer grows, and removes the row when it stores the
finished answer. If the writer of a row no longer runs, the answer was interrupted.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import astuple
from typing import TYPE_CHECKING

from pitlane.storage.types import UnfinishedAnswer, storable

if TYPE_CHECKING:
    from pitlane.storage.sqlite_file import SqliteFile


class Unfinished:
    """Keep, remove and list unfinished answers."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    def keep(self, answer: UnfinishedAnswer) -> None:
        """Store an unfinished answer; it replaces the row of its conversation. For a deleted conversation, store nothing."""
        key, writer, text, token_ids, stats, changed, question, continued = astuple(answer)
        row = (key, writer, storable(text), json.dumps(token_ids), json.dumps(stats, default=str), changed, question)
        with self._file.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO unfinished SELECT ?, ?, ?, ?, ?, ?, ?, ? WHERE EXISTS "
                "(SELECT 1 FROM conversations WHERE id = ?)",
                (*row, continued, key),
            )

    def forget(self, conversation_id: str) -> None:
        """Remove the row of a conversation, if the row exists."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM unfinished WHERE conversation_id = ?", (conversation_id,))

    def list(self) -> builtins.list[UnfinishedAnswer]:
        """Return all rows."""
        return [
            UnfinishedAnswer(
                **row | {"token_ids": tuple(json.loads(row["token_ids"])), "stats": json.loads(row["stats"])}
            )
            for row in self._file.rows("SELECT * FROM unfinished")
        ]
