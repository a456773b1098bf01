"""The database's schema, as migration steps. A released step is never edited; a change of the schema is a new step.

sqlite-utils records the steps that a database has. `unknown` finds steps of a newer Pitlane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sqlite_utils import Migrations

Step = Callable[[Any], None]

_migrations = Migrations("pitlane")


def migration(step: Step) -> Step:
    """Register a step. The function's name identifies it in the database."""
    return cast(Step, _migrations()(step))


def apply(db: Any) -> None:
    """Run the steps that this database lacks. Call it in a transaction, so that several processes can open the database."""
    _migrations.apply(db)


def pending(db: Any) -> bool:
    """True if `apply` would run a step."""
    return bool(_migrations.pending(db))


def unknown(db: Any) -> list[str]:
    """Names of applied steps that this version does not have."""
    names = [step.name for step in _migrations.applied(db)]
    known = {step.name for step in _migrations.pending(_Empty())}
    return [name for name in names if name not in known]


class _Empty:
    """An empty database for `pending`, which then returns all steps."""

    def __getitem__(self, name: str) -> _Empty:
        return self

    def exists(self) -> bool:
        return False


@migration
def m001_initial(db: Any) -> None:
    """Create documents with pages, saved prefixes, conversations with searchable messages, and runs."""
    db.executescript(_INITIAL)
    db["messages"].enable_fts(["text"], create_triggers=True)


@migration
def m002_refusals(db: Any) -> None:
    """Add to a message the reason why it has no answer."""
    db.execute("ALTER TABLE messages ADD COLUMN refusal TEXT")


@migration
def m003_comparisons(db: Any) -> None:
    """Create the table of comparisons."""
    db.execute(
        "CREATE TABLE comparisons (id INTEGER PRIMARY KEY AUTOINCREMENT, created REAL NOT NULL, model TEXT NOT NULL, "
        "report TEXT NOT NULL)"
    )


@migration
def m004_versions(db: Any) -> None:
    """Make the messages of a conversation a tree. Messages of one parent are versions of each other, and one of them is shown."""
    for statement in _VERSIONS.split(";"):  # `executescript` would end the transaction
        db.execute(statement)


@migration
def m005_unfinished(db: Any) -> None:
    """Create the table of answers that are being written."""
    db.execute(
        "CREATE TABLE unfinished (conversation_id TEXT PRIMARY KEY REFERENCES conversations (id) ON DELETE CASCADE, "
        "writer TEXT NOT NULL, text TEXT NOT NULL, token_ids TEXT NOT NULL, stats TEXT NOT NULL, changed INTEGER, "
        "question TEXT, continued INTEGER)"
    )


# AUTOINCREMENT: SQLite never uses an id again. Another tab may still hold the id of a deleted row.
_INITIAL = """
CREATE TABLE documents (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    mime TEXT NOT NULL,
    content_hash TEXT NOT NULL UNIQUE,
    num_pages INTEGER NOT NULL,
    num_chars INTEGER NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE document_pages (
    document_id TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
    page_index INTEGER NOT NULL,
    label TEXT NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (document_id, page_index)
);
CREATE TABLE prefixes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    block_hash TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    file TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    checksum TEXT NOT NULL,
    title TEXT NOT NULL,
    document_hash TEXT,
    pinned INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    last_used REAL NOT NULL,
    token_ids BLOB NOT NULL,
    UNIQUE (fingerprint, block_hash)
);
CREATE INDEX prefixes_longest ON prefixes (fingerprint, num_tokens DESC, block_hash);
CREATE TABLE conversations (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    model TEXT NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE INDEX conversations_updated ON conversations (updated);
CREATE TABLE conversation_documents (
    conversation_id TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    document_id TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
    PRIMARY KEY (conversation_id, position)
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    text TEXT NOT NULL,
    token_ids TEXT,
    stats TEXT,
    created REAL NOT NULL
);
CREATE INDEX messages_of_conversation ON messages (conversation_id, id);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    stats TEXT NOT NULL
);
"""

_VERSIONS = """
ALTER TABLE messages ADD COLUMN parent INTEGER;
ALTER TABLE messages ADD COLUMN is_shown INTEGER NOT NULL DEFAULT 1;
UPDATE messages SET parent = (
    SELECT max(before.id) FROM messages AS before
    WHERE before.conversation_id = messages.conversation_id AND before.id < messages.id
);
CREATE INDEX messages_of_parent ON messages (parent)
"""
