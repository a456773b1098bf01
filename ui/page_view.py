"""What a tab shows, drawn from the store: its state, the widgets that change, and the one way to draw each of them.

A tab's state is a small dictionary of ids; nothing of the engine is in it. Handlers (ui/handlers.py) build on this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Conversation, Message
from pitlane.ui.answering import Desk
from pitlane.ui.chat_flow import meter_html
from pitlane.ui.controls import PluginControls
from pitlane.ui.effects import effect
from pitlane.ui.offline_gradio import gr
from pitlane.ui.panels import conversations_html, documents_html, hits_html, last_stats, thread_html

Changes = dict[Any, Any]


class Tab(TypedDict):
    """What one browser tab is about. documents: attached ones, also before there is a conversation."""

    conversation: str | None
    documents: list[str]


def new_tab() -> Tab:
    return {"conversation": None, "documents": []}


@dataclass(slots=True)
class Widgets:
    """Every widget that a handler reads or changes."""

    tab: Any
    new: Any
    search: Any
    conversations: Any
    upload: Any
    documents: Any
    notice: Any
    sample: Any
    thread: Any
    live: Any
    box: Any
    send: Any
    stop: Any
    meter: Any
    plan: Any
    controls: PluginControls
    sampling: list[Any]

    @property
    def outputs(self) -> list[Any]:
        """Every widget that may change."""
        cards = [widget for card in self.controls.cards for widget in (card.switch, card.effect)]
        fixed = (
            self.tab,
            self.conversations,
            self.documents,
            self.notice,
            self.sample,
            self.thread,
            self.live,
            self.box,
        )
        return [*fixed, self.send, self.stop, self.meter, self.plan, *cards]


class View:
    """Draws a tab from the store."""

    def __init__(self, desk: Desk, widgets: Widgets) -> None:
        self.desk = desk
        self.ui = widgets

    def everything(self, tab: Tab, answering: bool = False) -> Changes:
        """All that depends on which conversation is open and what is in it."""
        messages, documents = self.messages(tab), self.desk.documents(tab["documents"])
        stats = last_stats(messages)
        effects = {
            card.effect: '<p class="{}">{}</p>'.format(*effect(card.plugin.name, stats, self.desk.roles))
            for card in self.ui.controls.cards
        }
        return {
            self.ui.tab: tab,
            self.ui.conversations: self.conversations(tab, ""),
            self.ui.documents: self.document_list(tab),
            self.ui.notice: "",
            self.ui.sample: gr.Button(visible=not self.desk.has_sample()),
            self.ui.thread: thread_html(messages, documents, self.desk.roles, tab["conversation"], answering),
            self.ui.live: "",
            self.ui.meter: self.meter(tab, messages),
            **effects,
        }

    def meter(self, tab: Tab, messages: Sequence[Message]) -> str:
        with suppress(PitlaneError):  # a template may refuse an unfinished conversation
            used, inside = self.desk.used_tokens(messages, tab["documents"], None)
            return meter_html(used, inside, self.desk.engine.loader.context)
        return ""

    def conversations(self, tab: Tab, search: str) -> str:
        store = self.desk.store.conversations
        if search.strip():
            return hits_html(store.search(search), search, tab["conversation"])
        return conversations_html(store.list(200), tab["conversation"], time.time())

    def document_list(self, tab: Tab, reading: dict[str, float] | None = None) -> str:
        return documents_html(self.desk.rows(tab["documents"], reading))

    def messages(self, tab: Tab) -> Sequence[Message]:
        if tab["conversation"] is None:
            return ()
        try:
            return self.desk.store.conversations.get(tab["conversation"]).messages
        except NotFound:
            return ()

    def with_documents(self, tab: Tab, ids: Sequence[str]) -> Tab:
        """The tab with these documents, in its conversation too where there is one."""
        unique, conversation = list(dict.fromkeys(ids)), tab["conversation"]
        if conversation is not None:
            self.attempt(lambda: self.desk.store.conversations.set_documents(conversation, unique))
        return {"conversation": conversation, "documents": unique}

    def tab_of(self, conversation: Conversation) -> Tab:
        return {"conversation": conversation.id, "documents": list(conversation.document_ids)}

    def buttons(self, answering: bool) -> Changes:
        return {
            self.ui.send: gr.Button(visible="hidden" if answering else True),
            self.ui.stop: gr.Button(visible=True if answering else "hidden", interactive=True),
        }

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Do it; say so if the user must know that it could not be done."""
        try:
            action()
        except PitlaneError as error:
            gr.Warning(str(error))
            return False
        return True
