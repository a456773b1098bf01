"""A tab of the page: its state, its widgets, and how they are drawn from the store.

The state of a tab is a small dictionary of ids; nothing of the engine is in it. An answer that is being written belongs to its
conversation: only tabs that show the conversation draw it. Event handlers extend `View`, and every handler is wrapped by
`page_event`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Conversation, Document, Message
from pitlane.ui.answering import Desk
from pitlane.ui.bench.gains import measured_gains
from pitlane.ui.chat_flow import meter_html
from pitlane.ui.controls import PluginControls, others_html
from pitlane.ui.effects import effect_html, num_dropped
from pitlane.ui.first_screen import EXPERIMENT
from pitlane.ui.lists import conversations_html, documents_html, hits_html
from pitlane.ui.live_frames import LiveFrames
from pitlane.ui.model_menu import BUNDLED, offer_html
from pitlane.ui.model_switch import ModelSwitch
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, new_tab, session_of, warn
from pitlane.ui.panels import Live, Waiting, last_stats, live_html, thread_html, waiting_html


@dataclass(slots=True)
class Writing:
    """An answer that is being written. session: the tab that asked; messages: the messages before the answer.

    key: names the answer, for tabs that ask for its frames.
    """

    session: str
    conversation: str
    messages: Sequence[Message]
    documents: Sequence[Document]
    live: Live
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    frames: LiveFrames = field(init=False)

    def __post_init__(self) -> None:
        self.frames = LiveFrames(self.documents)

    def html(self) -> str:
        return live_html(self.live, self.documents, self.key)


@dataclass(slots=True)
class Widgets:
    """Every widget that a handler reads or changes. models: the list of the model menu; other_model: its text field."""

    tab: Any
    models: Any
    other_model: Any
    use_other: Any
    top: Any
    attached: Any
    new: Any
    search: Any
    conversations: Any
    upload: Any
    documents: Any
    document_plugins: Any
    notice: Any
    sample: Any
    thread: Any
    live: Any
    queue: Any
    box: Any
    send: Any
    stop: Any
    meter: Any
    compare: Any
    compare_live: Any
    plan: Any
    plan_line: Any
    advice: Any
    controls: PluginControls
    others: Any
    sampling: list[Any]

    @property
    def outputs(self) -> list[Any]:
        """Every widget that may change."""
        cards = [
            widget
            for card in self.controls.cards
            for widget in (card.switch, card.note, card.state)
            if widget is not None
        ]
        return [*self.shown, *self.planned, self.document_plugins, *cards]

    @property
    def shown(self) -> list[Any]:
        """Widgets that `View.everything` draws. Gradio goes through all outputs of an event, whether they change or not."""
        fixed = (
            self.tab,
            self.attached,
            self.conversations,
            self.documents,
            self.notice,
            self.sample,
            self.thread,
            self.live,
            self.queue,
            self.box,
            self.others,
        )
        return [*fixed, self.send, self.stop, self.meter, *(card.effect for card in self.controls.cards)]

    @property
    def planned(self) -> list[Any]:
        """Widgets about the plan of the next answer, beside the cards."""
        no_drafter = self.controls.no_drafter
        return [self.plan, self.plan_line, self.advice, *([] if no_drafter is None else [no_drafter])]


class View:
    """Draws a tab from the store. notice: what a tab shows when it opens."""

    def __init__(self, desk: Desk, widgets: Widgets, switch: ModelSwitch, notice: str = "") -> None:
        self.desk, self.notice = desk, notice
        self.switch = switch
        self.is_retired = False  # the page accepts no more questions, because the model is about to change
        self.ui = widgets
        self.shown: dict[str, Tab] = {}  # by browser tab; may be newer than the state with which a running event began
        self.writing: dict[str, Writing] = {}  # by conversation
        self.waiting: dict[str, list[Waiting]] = {}  # by conversation; the first question is the next
        self.returned: dict[str, list[str]] = {}  # by browser tab: questions that left the line without an answer
        self.following: set[str] = set()  # browser tabs that show an answer which another tab asked for
        self.lock = RLock()

    def show(self, request: gr.Request, tab: Tab) -> Changes:
        """Draw a tab whole, and remember that this browser tab shows it."""
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
        """The tab as it was last drawn. A long event may have begun with an older state."""
        return self.shown.setdefault(session_of(request), tab)

    def shown_writing(self, request: gr.Request) -> Writing | None:
        """The unfinished answer of the conversation that the browser tab shows."""
        return self.writing.get(self.shown.get(session_of(request), new_tab())["conversation"] or "")

    def everything(self, tab: Tab) -> Changes:
        """All widgets that depend on the open conversation."""
        writing = self.writing.get(tab["conversation"] or "")
        messages = self.messages(tab) if writing is None else writing.messages
        model = self.desk.engine.loader.source.name
        documents, is_new = self.desk.documents(tab["documents"]), tab["conversation"] is None
        return {
            self.ui.tab: tab,
            self.ui.attached: json.dumps(tab["documents"] if is_new else []),
            self.ui.conversations: self.conversations(tab, ""),
            self.ui.documents: self.document_list(tab),
            self.ui.notice: "",
            self.ui.sample: gr.Button(visible=not self.desk.has_sample()),
            self.ui.thread: thread_html(
                messages,
                documents,
                self.desk.roles,
                tab["conversation"],
                writing is not None,
                offer_html(self.switch),
                model,
                "" if model == BUNDLED else EXPERIMENT,
            ),
            self.ui.live: "" if writing is None else writing.html(),
            self.ui.queue: self.line_html(tab["conversation"]),
            self.ui.meter: self.meter(tab, messages),
            self.ui.others: others_html(self.desk.engine.registry),
            **self.buttons(writing is not None),
            **self.effects(messages),
        }

    def line_html(self, conversation: str | None) -> str:
        """The questions that wait in a conversation."""
        line = self.waiting.get(conversation or "", ())
        return waiting_html([question for question in line if not question.is_taken_back])

    def effects(self, messages: Sequence[Message]) -> Changes:
        """The effect of every plugin, at its card: in the last answer, or measured by a comparison."""
        stats, roles, gains = last_stats(messages), self.desk.roles, {}
        with suppress(PitlaneError):
            gains = measured_gains(self.desk.store, self.desk.engine.loader.source.name)
        return {
            card.effect: effect_html(card.plugin.name, stats, roles, gains.get(card.plugin.name, ""))
            for card in self.ui.controls.cards
        }

    def meter(self, tab: Tab, messages: Sequence[Message]) -> str:
        with suppress(PitlaneError):  # a template may refuse an unfinished conversation
            used, inside = self.desk.used_tokens(messages, tab["documents"], None)
            dropped = num_dropped(last_stats(messages) or {})
            return meter_html(used, inside, self.desk.engine.loader.context, dropped)
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
        """The tab with these documents; a stored conversation gets them too."""
        unique, conversation = list(dict.fromkeys(ids)), tab["conversation"]
        if conversation is not None:
            store = self.desk.store.conversations
            self.attempt(lambda: store.set_documents(conversation, unique, leave_out_removed=True))
        return {"conversation": conversation, "documents": unique}

    def reopened(self, tab: Tab) -> Tab:
        """The tab as it is in the store now. If its conversation was deleted: an empty page over the same documents."""
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
        """Carry out an action and return whether it succeeded; show its PitlaneError."""
        try:
            action()
        except PitlaneError as error:
            warn(error)
            return False
        return True
