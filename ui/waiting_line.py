"""Questions that are typed while an answer is written: each waits until its conversation is free, in the order of typing.

The event that asks a question waits itself, so a question leaves the line with the tab that asked it. This event does not know the
text that is typed into the box meanwhile. So the text of a question without an answer returns by another event, `put_back`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pitlane.ui.model_events import ModelEvents
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event, session_of
from pitlane.ui.panels import Waiting

MAX_WAITING = 3  # questions in line per conversation; each holds one of the events that may run at once
POLL_SECONDS = 0.06
# An event yields at this interval, so that Gradio can close it. At each yield Gradio goes through all widgets, in the server and in
# the browser: at 1 s, this took more of the browser's time than the drawing of the answer. `Handlers.close` stops the answers of
# a closed tab at once.
ALIVE_SECONDS = 10.0


class WaitingLine(ModelEvents):
    """The line of every conversation, over one desk."""

    @page_event
    def take_back(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Take a waiting question out of the line, in the line of any tab. The text returns to the box of the tab that asked."""
        for questions in list(self.waiting.values()):
            for waiting in questions:
                waiting.is_taken_back |= waiting.key == event.id
        shown = self.shown.get(session_of(request))
        return {} if shown is None else {self.ui.queue: self.line_html(shown["conversation"])}

    @page_event
    def put_back(self, request: gr.Request, typed: str) -> Changes:
        """Put questions that left the line without an answer back into the box, behind the text that was typed meanwhile."""
        with self.lock:
            texts = self.returned.pop(session_of(request), [])
        kept = [typed] if typed.strip() else []
        return {self.ui.box: "\n\n".join([*kept, *texts])} if texts else {}

    def give_back(self, waiting: Waiting) -> None:
        """Keep the text of a question until `put_back` puts it into the box of its tab."""
        with self.lock:
            self.returned.setdefault(waiting.session, []).append(waiting.text)

    def line_up(self, request: gr.Request, tab: Tab, text: str) -> tuple[Tab | None, Waiting | None]:
        """Put a question in line if its conversation is busy. No tab: the line is too long, or the question is the one before."""
        with self.lock:
            self.check_open()
            tab = self.current(request, tab)
            conversation = tab["conversation"] or ""
            line = self.waiting.get(conversation, [])
            if conversation not in self.writing and not line:
                return tab, None
            if text == self._latest_question(conversation, line):
                return None, None  # a second click
            if len(line) >= MAX_WAITING:
                gr.Info(f"{MAX_WAITING} questions wait already; wait for an answer, or stop it.")
                return None, None
            waiting = Waiting(session_of(request), text)
            self.waiting.setdefault(conversation, []).append(waiting)
        return tab, waiting

    def _latest_question(self, conversation: str, line: Sequence[Waiting]) -> str | None:
        """The last question in line, or else the question that is being answered."""
        if line:
            return line[-1].text
        writing = self.writing.get(conversation)
        questions = [message.text for message in writing.messages if message.role == "user"] if writing else []
        return questions[-1] if questions else None

    def wait(self, waiting: Waiting, conversation: str) -> Iterator[Changes]:
        """Wait until the conversation is free and the question is the first in line, or is taken back."""
        alive = time.monotonic()
        while not waiting.is_taken_back:
            with self.lock:
                if conversation not in self.writing and self.waiting[conversation][0] is waiting:
                    return
            time.sleep(POLL_SECONDS)
            if time.monotonic() - alive > ALIVE_SECONDS:
                alive = time.monotonic()
                yield {self.ui.box: gr.skip()}

    def leave_line(self, waiting: Waiting, conversation: str) -> None:
        """Take a question out of the line. A question that left it already changes nothing."""
        with self.lock:
            line = [other for other in self.waiting.get(conversation, []) if other is not waiting]
            if line:
                self.waiting[conversation] = line
            else:
                self.waiting.pop(conversation, None)

    def current(self, request: gr.Request, tab: Tab) -> Tab:
        """The tab; if its first question is being answered, the tab with the conversation that this question began."""
        return self.shown[session_of(request)] if tab["conversation"] is None and self.shown_writing(request) else tab
