"""The terminal's conversation and its copy in the store, when another window changes the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pitlane.storage.db import Store
from pitlane.storage.types import Document, Page, Refusal
from pitlane.ui.commands.transcript import Entry, Transcript

DOCUMENT = Document("a.txt", "text/plain", (Page(0, "1", "Some text."),), "ab" * 32)


@pytest.fixture
def transcript() -> Iterator[Transcript]:
    """One saved turn over one document, and one turn that is not saved yet."""
    with Store() as store:
        store.documents.add(DOCUMENT)
        made = Transcript(store, "m", [Entry("user", "one"), Entry("assistant", "1")])
        made.save([DOCUMENT.content_hash])
        made.entries += [Entry("user", "two"), Entry("assistant", "2")]
        yield made


def saved(transcript: Transcript) -> list[str]:
    found = transcript.store.conversations.get(str(transcript.conversation_id))
    return [message.text for message in found.messages]


def test_turns_are_saved_without_a_document_that_was_removed_elsewhere(transcript: Transcript) -> None:
    transcript.store.documents.remove(DOCUMENT.content_hash[:12])
    transcript.save([DOCUMENT.content_hash])
    assert saved(transcript) == ["one", "1", "two", "2"]


def test_a_conversation_that_was_deleted_elsewhere_is_written_anew(transcript: Transcript) -> None:
    before = str(transcript.conversation_id)
    transcript.store.conversations.delete(before)
    transcript.save([DOCUMENT.content_hash], "Mine")
    assert transcript.conversation_id != before and saved(transcript) == ["one", "1", "two", "2"]


def test_messages_that_were_removed_elsewhere_can_be_taken_back_here(transcript: Transcript) -> None:
    transcript.store.conversations.truncate(str(transcript.conversation_id), transcript.entries[0].saved_id or 0)
    transcript.cut(0)
    assert transcript.entries == [] and saved(transcript) == []


def test_a_refused_question_of_the_page_is_no_part_of_a_loaded_prompt(transcript: Transcript) -> None:
    conversations, key = transcript.store.conversations, str(transcript.conversation_id)
    refused = conversations.append(key, "user", "too long")
    conversations.refuse(key, refused.id, Refusal("too long"))
    transcript.load(key)
    transcript.add(Entry("user", "next"))
    assert [turn["content"] for turn in transcript.messages()] == ["one", "1", "next"]
