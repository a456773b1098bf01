"""Runs in the store: the stats of finished requests, for `bench history`."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pitlane.storage.errors import NotFound
from pitlane.storage.types import Run

if TYPE_CHECKING:
    from pitlane.storage.sqlite_file import SqliteFile


class Runs:
    """Add and list the stats of requests."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    def add(self, stats: Mapping[str, Any]) -> int:
        """Store the stats of a run and return the run's id."""
        with self._file.transaction() as db:
            cursor = db.execute(
                "INSERT INTO runs (created, stats) VALUES (?, ?)", (time.time(), json.dumps(dict(stats), default=str))
            )
            return int(cursor.lastrowid)

    def list(self, limit: int = 50) -> builtins.list[Run]:
        """Return the latest runs, newest first."""
        return [_run(row) for row in self._file.rows("SELECT * FROM runs ORDER BY id DESC LIMIT ?", (limit,))]

    def get(self, run_id: int) -> Run:
        """Return one run by its id."""
        rows = self._file.rows("SELECT * FROM runs WHERE id = ?", (run_id,))
        if not rows:
            raise NotFound(f"no run {run_id}; list the stored ones")
        return _run(rows[0])


def _run(row: dict[str, Any]) -> Run:
    return Run(row["id"], row["created"], json.loads(row["stats"]))
