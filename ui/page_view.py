"""What a tab shows, drawn from the store: its state, the widgets that change, and the one way to draw each of them.

A tab's state is a small dictionary of ids; nothing of the engine is in it. An answer that is being written belongs to its
conversation: every tab that shows the conversation draws it, and no other. The handlers build on this; each handler goes
through `page_event`.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import wraps
from html import escape
from threading import Event, RLock
from typing import Any, TypedDict, TypeVar, cast

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Conversation, Document, Message
from pitlane.ui.answering import Desk
from pitlane.ui.chat_flow import meter_html
from pitlane.ui.controls import PluginControls
from pitlane.ui.effects import effect
from pitlane.ui.offline_gradio import gr
from pitlane.ui.panels import Live, conversations_html, documents_html, hits_html, last_stats, live_html, thread_html

Changes = dict[Any, Any]
Handler = TypeVar("Handler", bound=Callable[..., Any])


class Tab(TypedDict):
    """What one browser tab is about. documents: attached ones, also before there is a conversation."""

    conversation: str | None
    documents: list[str]


def page_event(handler: Handler) -> Handler:
    """Make a handler safe to leave early: it always changes something, if only by `gr.skip()`.

    Gradio empties every output of a generator that yields nothing, and refuses an empty dictionary. A PitlaneError that
    the handler lets through is shown as a warning, and the page stays as it is.
    """

    @wraps(handler)
    def steps(*values: Any) -> Iterator[Changes]:
        num_changes = 0
        try:
            with closing(handler(*values)) as found:
                for changes in found:
                    num_changes += 1
                    yield changes or gr.skip()
        except PitlaneError as error:
            warn(error)
        if not num_changes:
            yield gr.skip()

    @wraps(handler)
    def step(*values: Any) -> Any:
        try:
            return handler(*values) or gr.skip()
        except PitlaneError as error:
            warn(error)
            return gr.skip()

    return cast(Handler, steps if inspect.isgeneratorfunction(handler) else step)


def warn(error: PitlaneError) -> None:
    """Show an error in the corner of the page; Gradio reads the text as HTML."""
    gr.Warning(escape(str(error), quote=False))


def session_of(request: gr.Request) -> str:
    """The browser tab that sent a request."""
    return str(request.session_hash)


def new_tab() -> Tab:
    return {"conversation": None, "documents": []}


@dataclass(slots=True)
class Writing:
    """An answer that is being written. session: the tab that asked; messages: those that it answers."""

    session: str
    conversation: str
    messages: Sequence[Message]
    documents: Sequence[Document]
    live: Live
    num_watching: int = 0
    over: Event = field(default_factory=Event)  # set when nothing more comes

    def html(self) -> str:
        return live_html(self.live, self.documents)


@dataclass(slots=True)
class Widgets:
    """Every widget that a handler reads or changes."""

    tab: Any
    attached: Any
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
        cards = [widget for card in self.controls.cards for widget in (card.switch, card.note, card.effect)]
        fixed = (
            self.tab,
            self.attached,
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
        self.shown: dict[str, Tab] = {}  # by browser tab; newer than the state that an event of the tab began with
        self.writing: dict[str, Writing] = {}  # by conversation
        self.following: set[str] = set()  # browser tabs that show an answer which another tab asked for
        self.lock = RLock()

    def show(self, request: gr.Request, tab: Tab) -> Changes:
        """Everything, and remember that this browser tab shows it."""
        session = session_of(request)
        with self.lock:
            self.shown[session] = tab
            writing = self.writing.get(tab["conversation"] or "")
            if writing is not None and writing.session != session:
                self.following.add(session)
            else:
                self.following.discard(session)
        return self.everything(tab)

    def shown_tab(self, request: gr.Request, tab: Tab) -> Tab:
        """The tab as it was last drawn: an event that takes long may begin with an older state."""
        return self.shown.setdefault(session_of(request), tab)

    def shown_writing(self, request: gr.Request) -> Writing | None:
        """The answer that is being written in the conversation that the browser tab shows."""
        return self.writing.get(self.shown.get(session_of(request), new_tab())["conversation"] or "")

    def everything(self, tab: Tab) -> Changes:
        """All that depends on which conversation is open and what is in it."""
        writing = self.writing.get(tab["conversation"] or "")
        messages = self.messages(tab) if writing is None else writing.messages
        documents, is_new = self.desk.documents(tab["documents"]), tab["conversation"] is None
        stats = last_stats(messages)
        effects = {
            card.effect: '<p class="{}">{}</p>'.format(*effect(card.plugin.name, stats, self.desk.roles))
            for card in self.ui.controls.cards
        }
        return {
            self.ui.tab: tab,
            self.ui.attached: json.dumps(tab["documents"] if is_new else []),
            self.ui.conversations: self.conversations(tab, ""),
            self.ui.documents: self.document_list(tab),
            self.ui.notice: "",
            self.ui.sample: gr.Button(visible=not self.desk.has_sample()),
            self.ui.thread: thread_html(
                messages, documents, self.desk.roles, tab["conversation"], answering=writing is not None
            ),
            self.ui.live: "" if writing is None else writing.html(),
            self.ui.meter: self.meter(tab, messages),
            **self.buttons(writing is not None),
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
            store = self.desk.store.conversations
            self.attempt(lambda: store.set_documents(conversation, unique, leave_out_removed=True))
        return {"conversation": conversation, "documents": unique}

    def reopened(self, tab: Tab) -> Tab:
        """The tab as the store has it now; an empty page over the same documents if its conversation is gone."""
        if tab["conversation"] is None:
            return tab
        try:
            return self.tab_of(self.desk.store.conversations.get(tab["conversation"]))
        except NotFound:
            return {"conversation": None, "documents": tab["documents"]}

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
            warn(error)
            return False
        return True
