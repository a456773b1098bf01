"""Conversations in the store: messages with their token ids and stats, the documents they are about, and search.

Messages keep token ids beside text, so that a conversation continues from exactly the tokens that the model saw. The messages of
a conversation are a tree: the children of one message are versions of each other. One child is shown, the others are hidden with
all that follows them. The shown messages from the root are the conversation; their ids ascend.
"""

from __future__ import annotations

import builtins
import json
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pitlane.storage.conversation_rows import first_words, ids_text, message_of, shown_messages, stats_text
from pitlane.storage.errors import NotFound
from pitlane.storage.types import Conversation, Message, Refusal, SearchHit, storable

if TYPE_CHECKING:
    from pitlane.storage.documents import Documents
    from pitlane.storage.sqlite_file import SqliteFile

# The shown messages of all conversations.
_WITH_SHOWN = """
WITH RECURSIVE shown(id) AS (
    SELECT id FROM messages WHERE parent IS NULL AND is_shown
    UNION ALL
    SELECT m.id FROM messages AS m JOIN shown ON m.parent = shown.id WHERE m.is_shown
)
"""
_SELECT = """
SELECT c.*, (
    WITH RECURSIVE path(id) AS (
        SELECT id FROM messages WHERE conversation_id = c.id AND parent IS NULL AND is_shown
        UNION ALL
        SELECT m.id FROM messages AS m JOIN path ON m.parent = path.id WHERE m.is_shown
    ) SELECT count(*) FROM path
) AS num_messages FROM conversations AS c
"""
_DELETE_TREE = """
DELETE FROM messages WHERE id IN (
    WITH RECURSIVE tree(id) AS (
        SELECT ? UNION ALL SELECT m.id FROM messages AS m JOIN tree ON m.parent = tree.id
    ) SELECT id FROM tree
)
"""
_BY_WORDS = f"""
{_WITH_SHOWN}
SELECT m.conversation_id, m.id AS message_id, c.title, snippet(messages_fts, 0, '[', ']', '…', 16) AS snippet
FROM messages_fts
JOIN messages AS m ON m.id = messages_fts.rowid
JOIN conversations AS c ON c.id = m.conversation_id
WHERE messages_fts MATCH ? AND m.id IN shown ORDER BY messages_fts.rank LIMIT ?
"""
_BY_CHARACTERS = f"""
{_WITH_SHOWN}
SELECT m.conversation_id, m.id AS message_id, c.title,
       substr(m.text, max(1, instr(lower(m.text), lower(?)) - 40), 120) AS snippet
FROM messages AS m JOIN conversations AS c ON c.id = m.conversation_id
WHERE m.text LIKE ? ESCAPE '\\' AND m.id IN shown ORDER BY m.id DESC LIMIT ?
"""
_BY_TITLE = """
SELECT id AS conversation_id, NULL AS message_id, title, title AS snippet FROM conversations
WHERE title LIKE ? ESCAPE '\\' ORDER BY updated DESC LIMIT ?
"""


class Conversations:
    """Create, read, extend, cut, search and delete conversations."""

    def __init__(self, file: SqliteFile, documents: Documents) -> None:
        self._file, self._documents = file, documents

    def create(self, model: str, title: str = "") -> Conversation:
        """Start a conversation. Without a title, the first words of its first user message become the title."""
        now = time.time()
        row = (secrets.token_hex(6), storable(title), storable(model), now, now)
        with self._file.transaction() as db:
            db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", row)
        return Conversation(*row, num_messages=0)

    def rename(self, conversation_id: str, title: str) -> None:
        """Change the title of a conversation."""
        sql = "UPDATE conversations SET title = ? WHERE id = ?"
        self._change(sql, (storable(title), conversation_id), conversation_id)

    def delete(self, conversation_id: str) -> None:
        """Delete a conversation and its messages, but not its documents."""
        self._change("DELETE FROM conversations WHERE id = ?", (conversation_id,), conversation_id)

    def list(self, limit: int = 50) -> builtins.list[Conversation]:
        """Return conversations without their messages, most recently used first."""
        rows = self._file.rows(f"{_SELECT} ORDER BY c.updated DESC, c.rowid DESC LIMIT ?", (limit,))
        return [Conversation(**row) for row in rows]

    def get(self, conversation_id: str) -> Conversation:
        """Return one conversation with its shown messages in order and the ids of its documents."""
        rows = self._file.rows(f"{_SELECT} WHERE c.id = ?", (conversation_id,))
        if not rows:
            raise _missing(conversation_id)
        messages = self._file.rows("SELECT * FROM messages WHERE conversation_id = ? ORDER BY id", (conversation_id,))
        documents = self._file.rows(
            "SELECT document_id FROM conversation_documents WHERE conversation_id = ? ORDER BY position",
            (conversation_id,),
        )
        return Conversation(
            **rows[0],
            document_ids=tuple(row["document_id"] for row in documents),
            messages=tuple(shown_messages(messages)),
        )

    def append(
        self,
        conversation_id: str,
        role: str,
        text: str,
        *,
        token_ids: Sequence[int] | None = None,
        stats: Mapping[str, Any] | None = None,
    ) -> Message:
        """Add a message at the end."""
        text, now = storable(text), time.time()
        with self._file.transaction() as db:
            self._touch(conversation_id, first_words(text) if role == "user" else "")
            shown = self.get(conversation_id).messages
            values = (conversation_id, role, text, ids_text(token_ids), stats_text(stats), now)
            sql = (
                "INSERT INTO messages (conversation_id, role, text, token_ids, stats, created, parent) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)"
            )
            cursor = db.execute(sql, (*values, shown[-1].id if shown else None))
            return message_of(self._file.rows("SELECT * FROM messages WHERE id = ?", (cursor.lastrowid,))[0])

    def extend(
        self, conversation_id: str, message_id: int, text: str, token_ids: Sequence[int], stats: Mapping[str, Any]
    ) -> None:
        """Replace the text, the tokens and the stats of a message that was continued. A refusal of it is removed."""
        sql = "UPDATE messages SET text = ?, token_ids = ?, stats = ?, refusal = NULL WHERE id = ? AND conversation_id = ?"
        values = (storable(text), ids_text(token_ids), stats_text(stats), message_id, conversation_id)
        with self._file.transaction():
            self._touch(conversation_id)
            self._change(sql, values, conversation_id)

    def truncate(self, conversation_id: str, message_id: int) -> None:
        """Remove a message and all that follow it, hidden versions of the followers included.

        A title that was taken from a removed question is cleared: the next question gives a new title.
        """
        with self._file.transaction() as db:
            self._leave(conversation_id, message_id)
            db.execute(_DELETE_TREE, (message_id,))

    def branch(self, conversation_id: str, message_id: int) -> None:
        """Hide a message and all that follow it, for a retry or an edit: the next message is another version of it.

        A title that was taken from a hidden question is cleared: the next question gives a new title.
        """
        with self._file.transaction() as db:
            self._leave(conversation_id, message_id)
            db.execute("UPDATE messages SET is_shown = 0 WHERE id = ?", (message_id,))

    def show_version(self, conversation_id: str, message_id: int) -> None:
        """Show a version in the place of the shown one, with all that followed it. Raises NotFound for another message."""
        with self._file.transaction() as db:
            shown = next((m for m in self.get(conversation_id).messages if message_id in m.versions), None)
            if shown is None:
                raise _no_message(conversation_id, message_id)
            marks = ", ".join("?" * len(shown.versions))
            sql = f"UPDATE messages SET is_shown = (id = ?) WHERE id IN ({marks})"
            db.execute(sql, (message_id, *shown.versions))
            conversation = self.get(conversation_id)
            old, new = first_words(shown.text), next(m.text for m in conversation.messages if m.id == message_id)
            if shown.role == "user" and conversation.title == old:
                self.rename(conversation_id, first_words(new))

    def _leave(self, conversation_id: str, message_id: int) -> None:
        """Prepare a conversation for the end of its path before a message: its date, and its title."""
        self._touch(conversation_id)
        conversation = self.get(conversation_id)
        if all(message.id != message_id for message in conversation.messages):
            raise _no_message(conversation_id, message_id)
        question = next((message for message in conversation.messages if message.role == "user"), None)
        if question and question.id >= message_id and conversation.title == first_words(question.text):
            self.rename(conversation_id, "")

    def refuse(self, conversation_id: str, message_id: int, refusal: Refusal) -> None:
        """Store with a message the reason why it has no answer."""
        text = json.dumps({"reason": storable(refusal.reason), "ways": refusal.ways})
        sql = "UPDATE messages SET refusal = ? WHERE id = ? AND conversation_id = ?"
        self._change(sql, (text, message_id, conversation_id), conversation_id)

    def set_documents(
        self, conversation_id: str, document_ids: Sequence[str], *, leave_out_removed: bool = False
    ) -> None:
        """Set the documents of a conversation, in prompt order. Raises NotFound if a document is not stored.

        leave_out_removed: skip a document that another window or command has removed meanwhile, instead of raising.
        """
        if leave_out_removed:
            stored = {document.id for document in self._documents.list()}
            document_ids = [document_id for document_id in document_ids if document_id in stored]
        rows = [(conversation_id, position, key) for position, key in enumerate(dict.fromkeys(document_ids))]
        with self._file.transaction() as db:
            self._touch(conversation_id)
            db.execute("DELETE FROM conversation_documents WHERE conversation_id = ?", (conversation_id,))
            try:
                db.conn.executemany("INSERT INTO conversation_documents VALUES (?, ?, ?)", rows)
            except sqlite3.IntegrityError:
                names = ", ".join(document_ids)
                raise NotFound(f"not all of these documents are stored: {names}; add them first") from None

    def search(self, text: str, limit: int = 50) -> builtins.list[SearchHit]:
        """Find conversations by title, and shown messages by words. The last word also matches as the beginning of a word.

        If no words match (punctuation, scripts without spaces), messages are searched by characters. Any text is a valid
        search.
        """
        words = storable(text).split()
        if not words:
            return []
        phrase = " ".join(words)
        pattern = "%" + phrase.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        query = " ".join('"' + word.replace('"', '""') + '"' for word in words) + "*"
        rows = self._file.rows(_BY_TITLE, (pattern, limit)) + (
            self._file.rows(_BY_WORDS, (query, limit)) or self._file.rows(_BY_CHARACTERS, (phrase, pattern, limit))
        )
        return [SearchHit(**row) for row in rows[:limit]]

    def _touch(self, conversation_id: str, title: str = "") -> None:
        sql = "UPDATE conversations SET updated = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?"
        self._change(sql, (time.time(), title, conversation_id), conversation_id)

    def _change(self, sql: str, parameters: Sequence[Any], conversation_id: str) -> None:
        with self._file.transaction() as db:
            if db.execute(sql, parameters).rowcount == 0:
                raise _missing(conversation_id)


def _no_message(conversation_id: str, message_id: int) -> NotFound:
    return NotFound(f"conversation '{conversation_id}' has no message {message_id}; reload it")


def _missing(conversation_id: str) -> NotFound:
    return NotFound(f"no conversation '{conversation_id}'; it may have been deleted in another window")
