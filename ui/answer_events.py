"""Events of an answer: ask the engine, follow the answer to its end, refuse it with a reason. Frames of an unfinished answer.

The event that asks follows the answer to its end. When Gradio closes the event because the tab was closed, it stops the answer.
No event draws the unfinished answer: page.js asks the server for frames (ui/live_frames.py) and raises `settle` after the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Refusal
from pitlane.ui.answering import Key
from pitlane.ui.answers import was_stopped_before_it_began
from pitlane.ui.ask import Ask
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event, session_of, warn
from pitlane.ui.page_view import Writing
from pitlane.ui.panels import Live, Waiting
from pitlane.ui.plugin_events import PluginEvents
from pitlane.ui.refusals import STOPPED, refusal_of
from pitlane.ui.waiting_line import ALIVE_SECONDS, WaitingLine

Question = Callable[[Tab], tuple[Tab, Ask]]  # adds a question to the conversation, and returns how to answer it


class AnswerEvents(PluginEvents, WaitingLine):
    """Events of unfinished answers, over one desk."""

    def frame(self, key: str, tab: str, number: int) -> dict[str, Any]:
        """The next frame of an unfinished answer for a tab that drew frame `number`; `over` if there is no such answer."""
        writing = next((writing for writing in list(self.writing.values()) if writing.key == key), None)
        return {"over": True} if writing is None else writing.frames.next(writing.live, tab, number)

    @page_event
    def settle(self, request: gr.Request, tab: Tab) -> Changes:
        """Draw a finished answer in a tab that followed the answer of another tab. The next answer may have begun already."""
        if session_of(request) not in self.following:
            return {}
        return self.show(request, self.reopened(self.shown_tab(request, tab)))

    def ask_in_turn(self, request: gr.Request, tab: Tab, question: Question, waiting: Waiting) -> Iterator[Changes]:
        """Ask a question of the line when its turn comes. If it is taken back or refused, its text returns to the box."""
        conversation = str(tab["conversation"])
        try:
            yield {self.ui.box: "", self.ui.queue: self.line_html(conversation)}
            yield from self.wait(waiting, conversation)
            if not waiting.is_taken_back:
                yield from self.answer(request, tab, question, waiting=waiting)
        except PitlaneError as error:
            warn(error)
        finally:
            self.leave_line(waiting, conversation)
        if not waiting.is_asked:
            self.give_back(waiting)
            if self.shown_tab(request, tab)["conversation"] == conversation:
                yield {self.ui.queue: self.line_html(conversation)}

    def answer(
        self,
        request: gr.Request,
        tab: Tab,
        question: Question,
        changes: Changes | None = None,
        waiting: Waiting | None = None,
    ) -> Iterator[Changes]:
        """Ask a question and follow its answer to the end. changes: carried out if the question is accepted.

        waiting: the question was in line; the tab may show another conversation by now.
        """
        was_left = waiting is not None and self.shown_tab(request, tab)["conversation"] != tab["conversation"]
        tab, ask = self._begin(request, tab, question, waiting, was_left)
        if ask is None:
            if not was_left:
                yield self.show(request, tab)
            return
        conversation = str(tab["conversation"])
        writing, alive = self.writing[conversation], time.monotonic()
        self.desk.stop((session_of(request), "reading"))  # the prefix cache keeps the KV that is computed so far
        try:
            yield {self.ui.box: gr.skip()} if was_left else self.show(request, tab) | (changes or {})
            for writing.live in self.desk.answer(key_of(conversation), conversation, ask):
                if time.monotonic() - alive > ALIVE_SECONDS:
                    alive = time.monotonic()
                    yield {self.ui.box: gr.skip()}
            if writing.live.result is not None and was_stopped_before_it_began(writing.live.result):
                self._refuse(tab, ask, STOPPED)
        except Exception as error:
            self._refuse(tab, ask, self._refusal(tab, ask, error))
        finally:
            self.writing.pop(conversation, None)
        if self.shown_tab(request, tab)["conversation"] == conversation:
            yield self.show(request, self.reopened(tab))

    def _begin(
        self, request: gr.Request, tab: Tab, question: Question, waiting: Waiting | None, was_left: bool
    ) -> tuple[Tab, Ask | None]:
        """Register a question. Returns no Ask if the conversation waits for an answer or was deleted."""
        session = session_of(request)
        with self.lock:  # of two clicks at once, the second finds the answer of the first
            self.check_open()
            tab = self.current(request, tab)
            if waiting is not None:
                self.leave_line(waiting, str(tab["conversation"]))
            if tab["conversation"] in self.writing:
                gr.Info("An answer is on its way; stop it first.")
                return tab, None
            try:
                if waiting is not None:  # documents may have been attached since the question was typed
                    tab = self.tab_of(self.desk.store.conversations.get(str(tab["conversation"])))
                tab, ask = question(tab)
            except NotFound as error:
                warn(error)
                return self.reopened(tab), None
            conversation = self.desk.store.conversations.get(str(tab["conversation"]))
            messages, documents = ask.messages(conversation), self.desk.documents(tab["documents"])
            if ask.continued is not None:
                messages = (*messages, ask.continued)
            self.writing[conversation.id] = Writing(session, conversation.id, messages, documents, Live())
            if waiting is not None:
                waiting.is_asked = True
            if not was_left:
                self.shown[session] = tab
            self.desk.begin(key_of(conversation.id))
        return tab, ask

    def _refusal(self, tab: Tab, ask: Ask, error: Exception) -> Refusal:
        ids = [document.content_hash[:12] for document in self.desk.documents(tab["documents"])]
        longest = sorted(ids, key=self.desk.num_tokens, reverse=True)
        return refusal_of(error, ask.settings, self.desk.engine.document_plan.names, longest)

    def _refuse(self, tab: Tab, ask: Ask, refusal: Refusal) -> None:
        """Store the refusal with its question. If this fails, show it in the corner of the page."""
        try:
            self.desk.refuse(str(tab["conversation"]), ask, refusal)
        except NotFound as error:
            warn(error)
        except PitlaneError:
            gr.Warning(escape(refusal.reason, quote=False))


def key_of(conversation: str) -> Key:
    return conversation, "answer"
