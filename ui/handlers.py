"""Events of the page as a whole and of the list of conversations; `Handlers` joins them with all other events.

An event is a method: it takes values of widgets and returns changes of widgets. A generator yields changes while the engine reads
or writes. The page shows every error that a user can cause.
"""

from __future__ import annotations

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.ui.compare_events import CompareEvents
from pitlane.ui.document_events import DocumentEvents
from pitlane.ui.lists import notice_html
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, new_tab, page_event, session_of, warn
from pitlane.ui.plugin_events import kept_by_browser, text_kept_by_browser
from pitlane.ui.question_events import QuestionEvents


class Handlers(CompareEvents, DocumentEvents, QuestionEvents):
    """Events of all tabs, over one desk."""

    @page_event
    def load(self, request: gr.Request, tab: Tab, anchor: str, kept: str | None = None) -> Changes:
        """Open a tab, or reload it. anchor: its conversation; kept: the state that page.js keeps."""
        values, documents = kept_by_browser(kept)
        stored = {row.id for row in self.desk.store.documents.list()}
        tab = {"conversation": None, "documents": [key for key in documents if key in stored]}
        if anchor:
            try:
                tab = self.tab_of(self.desk.store.conversations.get(anchor))
            except NotFound as error:
                warn(error)
        notice = {self.ui.notice: notice_html((), [self.notice])} if self.notice else {}
        typed = text_kept_by_browser(kept)
        return self.show(request, tab) | self.restored(values, tab) | notice | ({self.ui.box: typed} if typed else {})

    def close(self, request: gr.Request) -> None:
        """Stop the requests of a tab that was closed."""
        session = session_of(request)
        self.desk.stop((session, "reading"))
        self.forget_comparison(session)
        for conversation, writing in list(self.writing.items()):
            if writing.session == session:
                self.desk.stop((conversation, "answer"))
        self.shown.pop(session, None)
        self.returned.pop(session, None)
        self.following.discard(session)

    @page_event
    def new(self, request: gr.Request, tab: Tab) -> Changes:
        """Start an empty conversation over the same documents."""
        return self.show(request, {"conversation": None, "documents": tab["documents"]}) | {self.ui.box: ""}

    @page_event
    def open(self, request: gr.Request, event: gr.EventData, tab: Tab, search: str) -> Changes:
        try:
            opened = self.tab_of(self.desk.store.conversations.get(str(event.id)))
        except PitlaneError as error:
            warn(error)
            return {self.ui.conversations: self.conversations(tab, search)}
        return self.show(request, opened) | {self.ui.conversations: self.conversations(opened, search)}

    @page_event
    def rename(self, event: gr.EventData, tab: Tab, search: str) -> Changes:
        title = " ".join(str(event.text).split())[:200]
        if title:
            self.attempt(lambda: self.desk.store.conversations.rename(str(event.id), title))
        return {self.ui.conversations: self.conversations(tab, search)}

    @page_event
    def remove(self, request: gr.Request, event: gr.EventData, tab: Tab, search: str) -> Changes:
        self.desk.stop((str(event.id), "answer"))
        self.attempt(lambda: self.desk.store.conversations.delete(str(event.id)))
        if tab["conversation"] != event.id:
            return {self.ui.conversations: self.conversations(tab, search)}
        return self.show(request, new_tab())

    @page_event
    def search(self, text: str, tab: Tab) -> Changes:
        return {self.ui.conversations: self.conversations(tab, text)}
