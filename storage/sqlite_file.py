"""One SQLite file that threads and processes share.

Threads share one connection behind one lock. Calls take microseconds to milliseconds; slow work (tensor files, checksums)
runs outside the lock. With one connection, the short-lived threads of the page leave no connections behind. Processes
share the file through the write-ahead log and a busy time-out. A write begins with `BEGIN IMMEDIATE`, so it waits for the
lock at its start and cannot fail for it half-way. A file does not survive `fork`: open it again in the child.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pitlane.storage.errors import StorageError, reason_of
from pitlane.storage.types import storable

# sqlite_utils imports pandas where it is installed, for a type that Pitlane does not use: 0.3 s at every start.
_HIDES_PANDAS = "pandas" not in sys.modules
if _HIDES_PANDAS:
    sys.modules["pandas"] = None  # type: ignore[assignment]
try:
    from sqlite_utils import Database

    from pitlane.storage import migrations
finally:
    if _HIDES_PANDAS:
        del sys.modules["pandas"]

BUSY_SECONDS = 10.0
_MIN_FREE_BYTES = 1 << 20
_SPACE_ADVICE = "files of saved KV beside it, in `prefixes`, may be deleted"


class SqliteFile:
    """Queries and transactions on one file. Raises StorageError, with the way out, if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, and bring its tables up to date."""
        self.path = path
        self._lock = threading.RLock()
        with self._named_errors():
            self._db = _open(self.path)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run a query and return its rows as dictionaries."""
        with self._lock, self._named_errors():
            cursor = self._db.execute(
                sql, [storable(value) if isinstance(value, str) else value for value in parameters]
            )
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Hold the write lock against all threads and processes. Commits at the end, rolls back on an error; may be nested."""
        with self._lock, self._named_errors():
            if self._db.conn.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.commit()
            except BaseException:
                self._db.rollback()
                raise

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # Other subclasses of DatabaseError (integrity, programming) are bugs of this project: do not rename them.
            if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise
            raise StorageError(_explain(self.path, error)) from error


def _open(path: Path) -> Any:
    connection = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(str(path), timeout=BUSY_SECONDS, check_same_thread=False)
        db = Database(connection, execute_plugins=False)
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(db, path)
        return db
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, OSError):
            raise StorageError(f"cannot open {path} ({reason_of(error)}); set PITLANE_HOME to another folder") from None
        raise


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. SQLite ignores the busy time-out for this switch, so retry in a loop."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _migrate(db: Any, path: Path) -> None:
    newer = migrations.unknown(db)
    if newer:
        raise StorageError(
            f"{path} was written by a newer Pitlane (it has {newer[-1]}); "
            "upgrade Pitlane, or set PITLANE_HOME to another folder"
        )
    if not migrations.pending(db):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        migrations.apply(db)
        db.commit()
    except BaseException:
        db.rollback()
        raise


def _explain(path: Path, error: sqlite3.DatabaseError) -> str:
    """Say what happened and what to do. Only an error by which SQLite reports damage is called damage."""
    reason = str(error)
    other_folder = "or set PITLANE_HOME to another folder"
    if "locked" in reason or "busy" in reason:
        return (
            f"{path} is in use by another process (waited {BUSY_SECONDS:.0f} s); try again, or close the other process"
        )
    if "full" in reason or ("I/O" in reason and _is_full(path.parent)):
        return (
            f"{path} cannot be written ({reason}): the disk is full; free some space ({_SPACE_ADVICE}), {other_folder}"
        )
    if "I/O" in reason:
        return (
            f"{path} cannot be read or written ({reason}): the disk or your share of it may be full, or it fails; "
            f"free some space ({_SPACE_ADVICE}), {other_folder}"
        )
    if "readonly" in reason or "unable to open" in reason or "denied" in reason:
        return f"{path} cannot be opened for writing ({reason}); check its permissions and its disk, {other_folder}"
    if "malformed" in reason or "not a database" in reason or "no such table" in reason or "no such column" in reason:
        return f"{path} is damaged or not a Pitlane database ({reason}); move it away to start with an empty one"
    return f"{path} cannot be used ({reason}); try again, {other_folder}"


def _is_full(folder: Path) -> bool:
    """Whether a folder's disk has no space left even for small files of SQLite."""
    try:
        return shutil.disk_usage(folder).free < _MIN_FREE_BYTES
    except OSError:
        return False
