"""How a question shall be answered: plugins, sampling, and the message that the answer changes. Knows no engine and no page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pitlane.storage.types import Conversation, Message
from pitlane.ui.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Ask:
    """How to answer a question. The question is the conversation's last message, except in two cases.

    settings: of the plugins in effect, so without document plugins if there is no document.
    replaced: this answer is generated again. edited: `text` replaces this question. The replaced messages are shown until the new
    answer is complete; then they are versions to go back to. continued: this answer was cut and goes on.
    """

    settings: Mapping[str, Mapping[str, Any]]
    sampling: Sampling
    system: str | None = None
    thinking: bool | None = None
    replaced: Message | None = None
    edited: Message | None = None
    continued: Message | None = None
    text: str = ""

    @property
    def changed(self) -> Message | None:
        """The message that becomes an earlier version."""
        return self.edited or self.replaced

    def messages(self, conversation: Conversation) -> tuple[Message, ...]:
        """The messages to answer: the messages before the change, and the new question."""
        changed = self.changed or self.continued
        if changed is None:
            return conversation.messages
        kept = tuple(message for message in conversation.messages if message.id < changed.id)
        if self.edited is None:
            return kept
        return (*kept, Message(0, conversation.id, "user", self.text, None, None, time.time()))


def seed_of(message: Message | None) -> int | None:
    """The seed of an answer, for a comparison with the same seed."""
    return int(message.stats["seed"]) if message is not None and message.stats else None
