"""Comparisons in the store: reports of one prompt under several plans, for `pitlane compare --history` and the plugin cards."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pitlane.storage.types import StoredComparison

if TYPE_CHECKING:
    from pitlane.storage.sqlite_file import SqliteFile


class Comparisons:
    """Add and list reports of comparisons."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    def add(self, report: Mapping[str, Any]) -> int:
        """Store a report, which names its model, and return its id."""
        values = (time.time(), str(report["model"]), json.dumps(dict(report), default=str))
        with self._file.transaction() as db:
            cursor = db.execute("INSERT INTO comparisons (created, model, report) VALUES (?, ?, ?)", values)
            return int(cursor.lastrowid)

    def list(self, limit: int = 50, model: str | None = None) -> builtins.list[StoredComparison]:
        """Return the latest comparisons, of one model or of all models, newest first."""
        rows = self._file.rows(
            "SELECT * FROM comparisons WHERE ?1 IS NULL OR model = ?1 ORDER BY id DESC LIMIT ?2", (model, limit)
        )
        return [StoredComparison(row["id"], row["created"], row["model"], json.loads(row["report"])) for row in rows]
