"""A conversation in the terminal and its copy in the database, with token ids and stats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pitlane.storage.conversation_rows import turns
from pitlane.storage.errors import NotFound

if TYPE_CHECKING:
    from pitlane.storage.db import Store
    from pitlane.storage.types import Conversation


@dataclass(slots=True)
class Entry:
    """One message. saved_id: its id in the database, None until it is saved."""

    role: str
    text: str
    token_ids: Sequence[int] | None = None
    stats: Mapping[str, Any] | None = None
    saved_id: int | None = None


@dataclass(slots=True)
class Transcript:
    """Messages in order, and the id of their conversation in the database (None before the first save)."""

    store: Store
    model: str
    entries: list[Entry] = field(default_factory=list)
    conversation_id: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """The messages for a prompt."""
        return turns(self.entries)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def cut(self, num_entries: int) -> None:
        """Keep the first `num_entries`, here and in the database."""
        self.forget(self.entries[num_entries:])
        del self.entries[num_entries:]

    def forget(self, entries: Sequence[Entry]) -> None:
        """Remove the last entries from the database, unless another window has removed them."""
        saved = next((entry.saved_id for entry in entries if entry.saved_id is not None), None)
        if saved is not None and self.conversation_id is not None:
            with suppress(NotFound):
                self.store.conversations.truncate(self.conversation_id, saved)

    def save(self, document_hashes: Sequence[str], title: str = "") -> str:
        """Save all entries that are not saved yet. Returns the id of the conversation.

        A document that another window removed is left out; a conversation that another window deleted is saved anew.
        """
        conversations = self.store.conversations
        if self.conversation_id is not None and not self._is_stored():
            self.conversation_id = None
            for entry in self.entries:
                entry.saved_id = None
        if self.conversation_id is None:
            self.conversation_id = conversations.create(self.model, title).id
        elif title:
            conversations.rename(self.conversation_id, title)
        ids = [content_hash[:12] for content_hash in document_hashes]
        conversations.set_documents(self.conversation_id, ids, leave_out_removed=True)
        for entry in self.entries:
            if entry.saved_id is None:
                message = conversations.append(
                    self.conversation_id, entry.role, entry.text, token_ids=entry.token_ids, stats=entry.stats
                )
                entry.saved_id = message.id
                if entry.stats:
                    self.store.runs.add(entry.stats)
        return self.conversation_id

    def _is_stored(self) -> bool:
        try:
            self.store.conversations.get(str(self.conversation_id))
        except NotFound:
            return False
        return True

    def load(self, conversation_id: str) -> Conversation:
        """Replace all entries by a saved conversation."""
        conversation = self.store.conversations.get(conversation_id)
        self.conversation_id = conversation.id
        self.entries = [Entry(m.role, m.text, m.token_ids, m.stats, m.id) for m in conversation.messages]
        return conversation

    def clear(self) -> None:
        """Begin another conversation; saved messages stay in the database."""
        self.entries, self.conversation_id = [], None

    def last_question(self) -> int | None:
        """Index of the last message of the user."""
        return next((i for i in reversed(range(len(self.entries))) if self.entries[i].role == "user"), None)

    def last_stats(self) -> Mapping[str, Any] | None:
        return next((entry.stats for entry in reversed(self.entries) if entry.stats), None)
