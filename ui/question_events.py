"""Events of the thread and the box: ask, edit, ask again, continue, stop, versions. ui/answer_events.py follows the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pitlane.storage.errors import NotFound
from pitlane.storage.types import Message
from pitlane.ui.answer_events import AnswerEvents, Question, key_of
from pitlane.ui.ask import Ask, seed_of
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event
from pitlane.ui.panels import can_go_on


class QuestionEvents(AnswerEvents):
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
            yield from self.answer(request, current, question, {self.ui.box: ""})
        else:
            yield from self.ask_in_turn(request, current, question, waiting)

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

        yield from self.answer(request, tab, question)

    @page_event
    def try_sample(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Attach the sample, then ask the clicked question of the empty page."""
        tab = self.with_documents(tab, [*tab["documents"], self.desk.add_sample().id])
        yield from self.answer(request, tab, self._new_question(str(event.id), values))

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
            yield from self.answer(request, tab, question)

    @page_event
    def retry(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Answer the last question again with the plugins that are on now, and compare both answers."""
        yield from self.answer(request, tab, self._last_question(values))

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
        yield from self.answer(request, tab, self._last_question(values))

    @page_event
    def stop(self, request: gr.Request) -> Changes:
        """Stop the answer of the conversation that the tab shows."""
        writing = self.shown_writing(request)
        if writing is not None:
            self.desk.stop(key_of(writing.conversation))
        return {self.ui.stop: gr.Button(interactive=False)}

    @page_event
    def cancel_recipe(self, request: gr.Request) -> Changes:
        """Cancel the recipe for which the answer waits. The question is then refused with the reason."""
        writing = self.shown_writing(request)
        recipe = writing.live.recipe() if writing is not None else None
        if recipe is not None:
            recipe.is_cancelled = True
        return {}

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

    def _switch(
        self, request: gr.Request, name: str, is_on: bool, tab: Tab, values: Sequence[Any]
    ) -> Iterator[Changes]:
        """Turn a plugin on or off, and ask the last question again."""
        card, num_sampling = self.ui.controls.card(name), len(self.ui.sampling)
        switches = self.ui.controls.switched(values[num_sampling:], name, is_on)
        if card is not None:
            yield {card.switch: is_on} | self.next_plan(tab, self.ui.controls.settings(switches))
        yield from self.answer(request, tab, self._last_question([*values[:num_sampling], *switches]))
