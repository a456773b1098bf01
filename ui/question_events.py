"""Events of the thread and the box: ask, edit, ask again, continue, stop, versions, and draw an answer while it is written.

The event that asks follows the answer to its end. When Gradio closes the event because the tab was closed, it stops the answer.
Another event (`watch`) draws the unfinished answer, with one widget as output: for an event with several outputs, Gradio rebuilds
all of them every time. This takes 20 ms of Python, and the engine's thread waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Message, Refusal
from pitlane.ui.answering import Key
from pitlane.ui.answers import was_stopped_before_it_began
from pitlane.ui.ask import Ask, seed_of
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_view import Changes, Tab, Writing, page_event, session_of, warn
from pitlane.ui.panels import Live, Waiting, can_go_on
from pitlane.ui.plugin_events import PluginEvents
from pitlane.ui.refusals import STOPPED, refusal_of
from pitlane.ui.waiting_line import ALIVE_SECONDS, WaitingLine

# Time between two drawings of an answer. A browser on the same processor takes time from the model: drawn every 0.04 s, 500 tokens
# of SmolLM2 on 2 cores came at 0.57 of the speed without a page.
FRAME_SECONDS, SECONDS_PER_CHARACTER, LONGEST_FRAME_SECONDS = 0.06, 1.6e-4, 0.4

Question = Callable[[Tab], tuple[Tab, Ask]]  # adds a question to the conversation, and returns how to answer it


class QuestionEvents(PluginEvents, WaitingLine):
    """Events of the thread and the box, over one desk."""

    @page_event
    def ask(self, request: gr.Request, text: str, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask the question in the box. While an answer is written, the question waits its turn."""
        text = text.strip()
        if not text:
            return
        self.read(values, tab["documents"])  # refuses a bad value while the question is still in the box
        current, waiting = self.line_up(request, tab, text)
        if current is None:
            return
        question = self._new_question(text, values)
        if waiting is None:
            yield from self._answer(request, current, question, {self.ui.box: ""})
        else:
            yield from self._ask_in_turn(request, current, question, waiting)

    @page_event
    def version(self, request: gr.Request, event: gr.EventData, tab: Tab) -> Changes:
        """Show another version of a message, with all that followed it."""
        conversation = tab["conversation"]
        with self.lock:  # no question begins between the check and the change
            if conversation in self.writing:
                gr.Info("An answer is on its way; stop it first.")
                return {}
            self.attempt(lambda: self.desk.store.conversations.show_version(str(conversation), int(event.id or 0)))
        return self.show(request, self.reopened(tab))

    @page_event
    def go_on(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Continue an answer that was cut, with its own seed.

        With the same sampling values, plugins and documents, it has the tokens of an answer that was not cut.
        """

        def question(tab: Tab) -> tuple[Tab, Ask]:
            messages, model = self._messages(tab), self.desk.engine.loader.source.name
            if not messages or str(messages[-1].id) != str(event.id) or not can_go_on(messages[-1], model):
                raise NotFound("this answer cannot be continued any more; the page shows it as it is now")
            ask = self.read(values, tab["documents"])
            sampling = ask.sampling.changed(seed=seed_of(messages[-1]))
            return tab, replace(ask, sampling=sampling, continued=messages[-1])

        yield from self._answer(request, tab, question)

    @page_event
    def try_sample(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Attach the sample, then ask the clicked question of the empty page."""
        tab = self.with_documents(tab, [*tab["documents"], self.desk.add_sample().id])
        yield from self._answer(request, tab, self._new_question(str(event.id), values))

    @page_event
    def edit(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask an edited question. The question and all messages after it become an earlier version."""
        text, message_id = str(event.text).strip(), int(event.id)

        def question(tab: Tab) -> tuple[Tab, Ask]:
            edited = next((message for message in self._messages(tab) if message.id == message_id), None)
            if edited is None:
                raise NotFound("this question was changed in another window; the page shows it as it is now")
            return tab, replace(self.read(values, tab["documents"]), edited=edited, text=text)

        if text:
            yield from self._answer(request, tab, question)

    @page_event
    def retry(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Answer the last question again with the plugins that are on now, and compare both answers."""
        yield from self._answer(request, tab, self._last_question(values))

    @page_event
    def turn_off(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask a refused question again without a plugin."""
        yield from self._switch(request, str(event.id), False, tab, values)

    @page_event
    def turn_on(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask a refused question again with a plugin more."""
        yield from self._switch(request, str(event.id), True, tab, values)

    @page_event
    def take_out(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask a refused question again without a document."""
        tab = self.with_documents(tab, [key for key in tab["documents"] if key != event.id])
        yield from self._answer(request, tab, self._last_question(values))

    @page_event
    def stop(self, request: gr.Request) -> Changes:
        """Stop the answer of the conversation that the tab shows."""
        writing = self.shown_writing(request)
        if writing is not None:
            self.desk.stop(_key(writing.conversation))
        return {self.ui.stop: gr.Button(interactive=False)}

    @page_event
    def watch(self, request: gr.Request) -> Iterator[Changes]:
        """Draw the unfinished answer of the tab's conversation, until it is complete or the tab shows another conversation.

        A tab that follows the answer of another tab stops there: `settle` draws the finished answer, and the question after it.
        """
        writing = self.shown_writing(request)
        while writing is not None:
            with self.lock:
                writing.num_watching += 1
            try:
                while not writing.over.is_set() and self.shown_writing(request) is writing:
                    yield {self.ui.live: writing.html()}
                    writing.over.wait(_frame_seconds(len(writing.live.text)))
            finally:
                with self.lock:
                    writing.num_watching -= 1
            was_left, writing = not writing.over.is_set(), self.shown_writing(request)
            if was_left and writing is None:
                yield {self.ui.live: ""}  # removes a last frame that arrived after the change of conversation
            if not was_left and session_of(request) in self.following:
                return

    @page_event
    def settle(self, request: gr.Request, tab: Tab) -> Changes:
        """Draw a finished answer in a tab that followed the answer of another tab. The next answer may have begun already."""
        if session_of(request) not in self.following:
            return {}
        return self.show(request, self.reopened(self.shown_tab(request, tab)))

    # ---- questions

    def _new_question(self, text: str, values: Sequence[Any]) -> Question:
        def question(tab: Tab) -> tuple[Tab, Ask]:
            ask, conversations, key = (
                self.read(values, tab["documents"]),
                self.desk.store.conversations,
                tab["conversation"],
            )
            with self.desk.store.transaction():
                if key is None:
                    key = conversations.create(self.desk.engine.loader.source.name).id
                    conversations.set_documents(key, tab["documents"], leave_out_removed=True)
                conversations.append(key, "user", text)
            return {"conversation": key, "documents": tab["documents"]}, ask

        return question

    def _last_question(self, values: Sequence[Any]) -> Question:
        def question(tab: Tab) -> tuple[Tab, Ask]:
            messages = self._messages(tab)
            if not messages:
                raise NotFound("there is no question to ask again; write one")
            replaced = messages[-1] if messages[-1].role == "assistant" else None
            return tab, self.read(values, tab["documents"], replaced)

        return question

    def _messages(self, tab: Tab) -> Sequence[Message]:
        """Messages of the tab's conversation. Raises NotFound for a deleted conversation."""
        return () if tab["conversation"] is None else self.desk.store.conversations.get(tab["conversation"]).messages

    # ---- answers

    def _ask_in_turn(self, request: gr.Request, tab: Tab, question: Question, waiting: Waiting) -> Iterator[Changes]:
        """Ask a question of the line when its turn comes. If it is taken back or refused, its text returns to the box."""
        conversation = str(tab["conversation"])
        try:
            yield {self.ui.box: "", self.ui.queue: self.line_html(conversation)}
            yield from self.wait(waiting, conversation)
            if not waiting.is_taken_back:
                yield from self._answer(request, tab, question, waiting=waiting)
        except PitlaneError as error:
            warn(error)
        finally:
            self.leave_line(waiting, conversation)
        if not waiting.is_asked:
            self.give_back(waiting)
            if self.shown_tab(request, tab)["conversation"] == conversation:
                yield {self.ui.queue: self.line_html(conversation)}

    def _switch(
        self, request: gr.Request, name: str, is_on: bool, tab: Tab, values: Sequence[Any]
    ) -> Iterator[Changes]:
        """Turn a plugin on or off, and ask the last question again."""
        card, num_sampling = self.ui.controls.card(name), len(self.ui.sampling)
        switches = self.ui.controls.switched(values[num_sampling:], name, is_on)
        if card is not None:
            yield {card.switch: is_on} | self.next_plan(tab, self.ui.controls.settings(switches))
        yield from self._answer(request, tab, self._last_question([*values[:num_sampling], *switches]))

    def _answer(
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
            for writing.live in self.desk.answer(_key(conversation), conversation, ask):
                if time.monotonic() - alive > ALIVE_SECONDS:
                    alive = time.monotonic()
                    yield {self.ui.box: gr.skip()}
            if writing.live.result is not None and was_stopped_before_it_began(writing.live.result):
                self._refuse(tab, ask, STOPPED)
        except Exception as error:
            self._refuse(tab, ask, self._refusal(tab, ask, error))
        finally:
            writing.over.set()
            self.writing.pop(conversation, None)
        ended = time.monotonic()
        while writing.num_watching and time.monotonic() - ended < 2 * ALIVE_SECONDS:
            time.sleep(FRAME_SECONDS / 10)  # otherwise the last frame could arrive after the finished answer
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
            self.desk.begin(_key(conversation.id))
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


def _frame_seconds(num_characters: int) -> float:
    """Time between two drawings of an answer of this length: a longer answer takes longer to draw."""
    return min(FRAME_SECONDS + SECONDS_PER_CHARACTER * num_characters, LONGEST_FRAME_SECONDS)


def _key(conversation: str) -> Key:
    return conversation, "answer"
