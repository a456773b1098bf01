"""The store as a whole: opening, reopening, migrations, damage, threads, processes."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pitlane.storage import migrations
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, PitlaneError, StorageError
from pitlane.storage.home import home

TABLES = {
    "documents",
    "document_pages",
    "prefixes",
    "conversations",
    "conversation_documents",
    "messages",
    "runs",
    "comparisons",
    "unfinished",
}


def test_empty_database_gets_all_tables_and_wal(tmp_path: Path) -> None:
    with Store(tmp_path / "pitlane.db") as store:
        tables = {row["name"] for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables >= TABLES
        assert store.rows("PRAGMA journal_mode")[0]["journal_mode"] == "wal"
        assert store.rows("PRAGMA foreign_keys")[0]["foreign_keys"] == 1


def test_reopening_keeps_rows_and_applies_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "pitlane.db"
    with Store(path) as store:
        conversation = store.conversations.create("bundled")
        store.conversations.append(conversation.id, "user", "hello")
        applied = store.rows("SELECT name, applied_at FROM _sqlite_migrations")
    with Store(path) as store:
        assert store.conversations.get(conversation.id).messages[0].text == "hello"
        assert store.rows("SELECT name, applied_at FROM _sqlite_migrations") == applied
        assert [row["name"] for row in applied] == [
            "m001_initial", "m002_refusals", "m003_comparisons", "m004_versions", "m005_unfinished",
        ]  # fmt: skip


def test_a_database_of_the_version_before_keeps_its_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "pitlane.db", migrations._migrations._migrations
    monkeypatch.setattr(migrations._migrations, "_migrations", steps[:1])
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO conversations VALUES ('k', 'title', 'm', 0, 0)")
        connection.execute("INSERT INTO messages (conversation_id, role, text, created) VALUES ('k', 'user', 'hi', 0)")
    connection.close()
    monkeypatch.undo()
    with Store(path) as store:
        (message,) = store.conversations.get("k").messages
        assert (message.text, message.refusal) == ("hi", None)


def test_a_step_that_fails_leaves_the_database_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(db: object) -> None:
        raise sqlite3.OperationalError("no such thing")

    monkeypatch.setattr(migrations._migrations._migrations[0], "fn", broken)
    with pytest.raises(StorageError):
        Store(tmp_path / "pitlane.db")
    monkeypatch.undo()
    with Store(tmp_path / "pitlane.db") as store:
        assert store.runs.list() == []


def test_newer_database_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "pitlane.db"
    Store(path).close()
    connection = sqlite3.connect(path)
    sql = "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('pitlane', 'm099_future', '')"
    connection.execute(sql)
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match=r"pitlane\.db was written by a newer Pitlane .*m099_future.*upgrade"):
        Store(path)


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_what_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pitlane.db"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"pitlane\.db is damaged or not a Pitlane database .*move it away"):
        Store(path)
    assert path.read_bytes() == content


def test_damage_found_later_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "pitlane.db"
    with Store(path) as store:
        key = store.conversations.create("bundled").id
        for number in range(200):
            store.conversations.append(key, "user", f"{number} " * 100)
    data = bytearray(path.read_bytes())
    for start in range(4096 * 20, len(data), 4096):  # the schema stays intact, so that opening works
        data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"), Store(path) as store:
        store.conversations.get(key)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("database or disk is full", "the disk is full; free some space"),
        ("disk I/O error", "the disk or your share of it may be full, or it fails; free some space"),
        ("attempt to write a readonly database", "check its permissions and its disk"),
        ("unable to open database file", "check its permissions and its disk"),
        ("something new", "cannot be used"),
    ],
)
def test_a_disk_that_cannot_be_written_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, words: str
) -> None:
    def fail(connection: object) -> None:
        raise sqlite3.OperationalError(reason)

    monkeypatch.setattr("pitlane.storage.sqlite_file._use_wal", fail)
    with pytest.raises(StorageError, match=r"pitlane.db cannot .*set PITLANE_HOME to another folder$") as caught:
        Store(tmp_path / "pitlane.db")
    assert f"({reason})" in str(caught.value) and words in str(caught.value)
    assert "damaged" not in str(caught.value) and "move it away" not in str(caught.value)


def test_an_io_error_on_a_full_disk_is_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite reports `disk I/O error` if it cannot create its log."""
    with Store(tmp_path / "pitlane.db") as store:
        monkeypatch.setattr("pitlane.storage.sqlite_file.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
        with pytest.raises(StorageError, match="the disk is full"), store.transaction():
            raise sqlite3.OperationalError("disk I/O error")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full, or your share of it; free some space"),
        (errno.EDQUOT, "the disk is full, or your share of it; free some space"),
        (errno.EROFS, "choose another disk"),
        (errno.EACCES, "check its permissions"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(path: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", fail)
    for make in (home, lambda: Store(tmp_path / "pitlane.db")):
        with pytest.raises(StorageError, match=f"{os.strerror(number)}.*{words}.*set PITLANE_HOME to another"):
            make()


def test_a_name_in_another_encoding_is_not_found(tmp_path: Path) -> None:
    """Bytes of an argument that are not UTF-8 arrive as lone surrogates."""
    with Store(tmp_path / "pitlane.db") as store:
        with pytest.raises(NotFound):
            store.conversations.get("\udcff")
        with pytest.raises(NotFound):
            store.documents.get("\udcff")
        assert store.conversations.search("\udcff", 5) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="PITLANE_HOME"):
        Store(tmp_path / "file" / "pitlane.db")


def test_home_is_private_and_made_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITLANE_HOME", str(tmp_path / "a" / "b"))
    assert home() == tmp_path / "a" / "b"
    if os.name == "posix":
        assert stat.S_IMODE(home().stat().st_mode) == 0o700
    with Store() as store:
        assert store.path == home() / "pitlane.db"
        assert store.prefixes.folder == home() / "prefixes"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PITLANE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="it is a file"):
        home()


def test_two_databases_in_one_folder_do_not_clean_each_other(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as first, Store(tmp_path / "b.db") as second:
        assert first.prefixes.folder != second.prefixes.folder


def test_transaction_rolls_back_as_a_whole(tmp_path: Path) -> None:
    with Store(tmp_path / "pitlane.db") as store:
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.runs.add({"a": 1})
            raise ZeroDivisionError
        assert store.runs.list() == []
        store.runs.add({"a": 2})
        assert len(store.runs.list()) == 1


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with Store(tmp_path / "pitlane.db") as store:
        key = store.conversations.create("bundled").id

        def work(number: int) -> None:
            try:
                for turn in range(20):
                    store.conversations.append(key, "user", f"{number}/{turn}")
                    store.conversations.list()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(store.conversations.get(key).messages) == 160


def test_many_processes_open_and_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pitlane.storage.db import Store\n"
        "assert 'torch' not in sys.modules\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    for number in range(30): store.runs.add({'n': number})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pitlane.db")]) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0] * 3
    with Store(tmp_path / "pitlane.db") as store:
        assert len(store.runs.list(1000)) == 90


def test_closing_twice_and_errors_share_one_root(tmp_path: Path) -> None:
    store = Store(tmp_path / "pitlane.db")
    store.close()
    store.close()
    assert issubclass(StorageError, PitlaneError)
