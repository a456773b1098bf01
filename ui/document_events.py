"""Events of the document list: add files, attach, detach and remove documents. Computes the KV of attached documents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import StoredDocument
from pitlane.ui.lists import notice_html
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event, session_of
from pitlane.ui.plugin_events import PluginEvents

SAVE_SECONDS = 1.0  # the longest wait for KV that is being written to disk


class DocumentEvents(PluginEvents):
    """Events of the document list, over one desk."""

    @page_event
    def upload(self, request: gr.Request, paths: Sequence[str], tab: Tab, *values: Any) -> Iterator[Changes]:
        """Read files into the store, attach them, and compute their KV; the uploaded copies are deleted."""
        problems: list[str] = []
        remarks: list[str] = []
        added: list[str] = []
        known = {row.id for row in self.desk.store.documents.list()}
        for path in map(Path, paths or ()):
            yield {self.ui.notice: f'<p class="working">Reading {escape(path.name)}</p>'}
            try:
                stored = self.desk.add_file(path)
                if stored.id in {*known, *added}:
                    remarks.append(_already_here(path.name, stored))
                added.append(stored.id)
            except PitlaneError as error:
                problems.append(str(error))
            finally:
                path.unlink(missing_ok=True)
        yield from self._read(request, tab, added, values, problems, remarks)

    @page_event
    def sample(self, request: gr.Request, tab: Tab, *values: Any) -> Iterator[Changes]:
        yield from self._read(request, tab, [self.desk.add_sample().id], values)

    @page_event
    def attach(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Attach or detach a document."""
        document_id = str(event.id)
        if document_id in self.shown_tab(request, tab)["documents"]:
            yield from self._read(request, tab, [], values, taken_out=document_id)
        else:
            problems = self._missing(document_id)
            yield from self._read(request, tab, [] if problems else [document_id], values, problems)

    @page_event
    def discard(self, request: gr.Request, event: gr.EventData, tab: Tab) -> Changes:
        document_id = str(event.id)
        with suppress(NotFound):  # another window has removed it
            self.desk.forget(document_id)
        return self.show(request, self.with_documents(tab, [key for key in tab["documents"] if key != document_id]))

    @page_event
    def dismiss(self) -> Changes:
        """The user has read the notice."""
        return {self.ui.notice: ""}

    def _missing(self, document_id: str) -> list[str]:
        try:
            self.desk.store.documents.get(document_id)
        except NotFound:
            return ["This document was removed in another window."]
        return []

    def _read(
        self,
        request: gr.Request,
        tab: Tab,
        added: Sequence[str],
        values: Sequence[Any],
        problems: Sequence[str] = (),
        remarks: Sequence[str] = (),
        taken_out: str = "",
    ) -> Iterator[Changes]:
        """Attach documents to the tab's conversation, and compute their KV with progress in the list.

        If the tab shows another conversation by now, only the list of that conversation is drawn.
        """
        shown, notice = self.shown_tab(request, tab), {self.ui.notice: notice_html(problems, remarks)}
        if shown["conversation"] != tab["conversation"]:
            left = self.reopened(tab)
            self.with_documents(left, [*left["documents"], *added])
            yield {self.ui.documents: self.document_list(shown)} | notice
            return
        tab = self.with_documents(shown, [key for key in (*shown["documents"], *added) if key != taken_out])
        yield self.show(request, tab) | notice
        problems = list(problems)
        try:
            yield from self._prefill(request, tab, values, problems)
        except PitlaneError as error:
            problems.append(str(error))
        if self.shown_tab(request, tab) == tab:
            yield {self.ui.documents: self.document_list(tab), self.ui.notice: notice_html(problems, remarks)}

    def _prefill(self, request: gr.Request, tab: Tab, values: Sequence[Any], problems: list[str]) -> Iterator[Changes]:
        """Compute the KV of the tab's documents. A computation that runs for the tab is stopped."""
        key = (session_of(request), "reading")
        self.desk.stop(key)
        if not tab["documents"]:
            return
        newest = tab["documents"][-1]
        ask, reading = self.read(values, tab["documents"]), None
        self.desk.check_fits(tab["documents"], self.desk.engine.plan(ask.settings))
        for reading in self.desk.prefill(key, tab["documents"], ask):
            if self.shown_tab(request, tab) != tab:
                return
            yield {self.ui.documents: self.document_list(tab, {newest: reading.share})}
        if reading is not None:
            problems += [f"Answers go on without {name}: {reason}" for name, reason in reading.left_out.items()]
        self._await_saved(newest)

    def _await_saved(self, document_id: str) -> None:
        """Wait a moment for the plugin's thread that writes KV to disk, so that the list can show it."""
        deadline = time.monotonic() + SAVE_SECONDS
        content_hash = self.desk.document(document_id).content_hash
        while time.monotonic() < deadline:
            if any(prefix.document_hash == content_hash for prefix in self.desk.store.prefixes.list()):
                return
            time.sleep(0.05)


def _already_here(name: str, stored: StoredDocument) -> str:
    if name == stored.title:
        return f"Already here: {stored.title}"
    return f"{name} is already here: {stored.title}"
