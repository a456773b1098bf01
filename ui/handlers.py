"""What happens on the page: one method per event. Each takes values of widgets and returns changes of widgets.

Generators yield while an answer is written or a document is read; when Gradio closes one (the tab is gone) the request
behind it is stopped. What stands in the answer so far is drawn by an event of its own (`watch`), which changes one widget: for a
change of any of several, Gradio makes all of them anew, 20 ms of Python that the engine's thread would wait for 25 times a second.
Errors that people can cause are shown in the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pitlane.engine.types import SamplingParams
from pitlane.storage.errors import PitlaneError
from pitlane.storage.types import Document, Message
from pitlane.ui.answering import Ask, Desk, Key, seed_of
from pitlane.ui.controls import Card, Settings, plan_html, refusal_html
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_view import Changes, Tab, View, Widgets, new_tab
from pitlane.ui.panels import Live, error_html, live_html

THINKING = {"auto": None, "on": True, "off": False}
SAVE_SECONDS = 1.0  # how long a list waits for KV that is being written to disk
FRAME_SECONDS = 0.04  # 25 updates of an answer a second, however fast tokens come
ALIVE_SECONDS = 1.0  # how often an answer's own event can be closed


@dataclass(slots=True)
class Writing:
    """An answer that is being written, and how many events draw it."""

    live: Live
    documents: Sequence[Document]
    num_watching: int = 0
    is_over: bool = False


class Handlers(View):
    """Events of all tabs, over one desk."""

    def __init__(self, desk: Desk, widgets: Widgets) -> None:
        super().__init__(desk, widgets)
        self.writing: dict[Key, Writing] = {}

    # ---- the page as a whole

    def load(self, tab: Tab, anchor: str) -> Changes:
        """A fresh tab, or one that was reloaded with a conversation open."""
        tab = new_tab()
        with suppress(PitlaneError):
            if anchor:
                tab = self.tab_of(self.desk.store.conversations.get(anchor))
        return self.everything(tab)

    def close(self, request: gr.Request) -> None:
        """The tab is gone: stop what it asked for."""
        for purpose in ("answer", "reading"):
            self.desk.stop((str(request.session_hash), purpose))
        self.writing.pop((str(request.session_hash), "answer"), None)

    def new(self, request: gr.Request, tab: Tab) -> Changes:
        """An empty conversation over the same documents."""
        return self.everything({"conversation": None, "documents": tab["documents"]}) | {self.ui.box: ""}

    def open(self, event: gr.EventData, tab: Tab, search: str) -> Changes:
        try:
            conversation = self.desk.store.conversations.get(str(event.id))
        except PitlaneError as error:
            gr.Warning(str(error))
            return {self.ui.conversations: self.conversations(tab, search)}
        opened = self.tab_of(conversation)
        return self.everything(opened) | {self.ui.conversations: self.conversations(opened, search)}

    def rename(self, event: gr.EventData, tab: Tab, search: str) -> Changes:
        title = " ".join(str(event.text).split())[:200]
        if title:
            self.attempt(lambda: self.desk.store.conversations.rename(str(event.id), title))
        return {self.ui.conversations: self.conversations(tab, search)}

    def remove(self, event: gr.EventData, tab: Tab, search: str) -> Changes:
        self.attempt(lambda: self.desk.store.conversations.delete(str(event.id)))
        if tab["conversation"] != event.id:
            return {self.ui.conversations: self.conversations(tab, search)}
        return self.everything(new_tab())

    def search(self, text: str, tab: Tab) -> Changes:
        return {self.ui.conversations: self.conversations(tab, text)}

    # ---- documents

    def upload(self, request: gr.Request, paths: Sequence[str], tab: Tab, *values: Any) -> Iterator[Changes]:
        """Read files into the store, attach them, and compute their KV; the uploaded copies are deleted."""
        problems, added = [], []
        for path in map(Path, paths or ()):
            yield {self.ui.notice: f'<p class="working">Reading {escape(path.name)}</p>'}
            try:
                added.append(self.desk.add_file(path).id)
            except PitlaneError as error:
                problems.append(str(error))
            finally:
                path.unlink(missing_ok=True)
        tab = self.with_documents(tab, [*tab["documents"], *added])
        yield from self._read(request, tab, values, "".join(f"<p>{escape(problem)}</p>" for problem in problems))

    def sample(self, request: gr.Request, tab: Tab, *values: Any) -> Iterator[Changes]:
        tab = self.with_documents(tab, [*tab["documents"], self.desk.add_sample().id])
        yield from self._read(request, tab, values)

    def attach(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Attach a document that is not attached, detach one that is."""
        wanted, ids = str(event.id), tab["documents"]
        tab = self.with_documents(tab, [key for key in ids if key != wanted] if wanted in ids else [*ids, wanted])
        yield from self._read(request, tab, values)

    def discard(self, event: gr.EventData, tab: Tab) -> Changes:
        document_id = str(event.id)
        self.attempt(lambda: self.desk.forget(document_id))
        return self.everything(self.with_documents(tab, [key for key in tab["documents"] if key != document_id]))

    def _read(self, request: gr.Request, tab: Tab, values: Sequence[Any], problems: str = "") -> Iterator[Changes]:
        """Show the tab's documents and compute their KV, with progress in the list."""
        key = (str(request.session_hash), "reading")
        self.desk.stop(key)
        notice = f'<div class="problem" role="alert">{problems}</div>' if problems else ""
        yield self.everything(tab) | {self.ui.notice: notice}
        if not tab["documents"]:
            return
        try:
            self.desk.check_fits(tab["documents"])
            newest = tab["documents"][-1]
            for share in self.desk.prefill(key, tab["documents"], self._ask(values)):
                yield {self.ui.documents: self.document_list(tab, {newest: share})}
            self._await_saved(newest)
        except PitlaneError as error:
            notice = f'<div class="problem" role="alert">{problems}<p>{escape(str(error))}</p></div>'
        yield {self.ui.documents: self.document_list(tab), self.ui.notice: notice}

    def _await_saved(self, document_id: str) -> None:
        """Saved KV is written by a thread of the plugin's; give it a moment before the list is drawn."""
        deadline = time.monotonic() + SAVE_SECONDS
        content_hash = self.desk.document(document_id).content_hash
        while time.monotonic() < deadline:
            if any(prefix.document_hash == content_hash for prefix in self.desk.store.prefixes.list()):
                return
            time.sleep(0.05)

    # ---- questions

    def ask(self, request: gr.Request, text: str, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask what stands in the box."""
        if not text.strip():
            return
        if self.desk.is_running((str(request.session_hash), "answer")):
            gr.Info("An answer is on its way; stop it first.")
            return
        yield from self._question(request, tab, text.strip(), values)

    def try_sample(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """A question of the empty page: attach the sample, then ask."""
        tab = self.with_documents(tab, [*tab["documents"], self.desk.add_sample().id])
        yield from self._question(request, tab, str(event.id), values)

    def edit(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Ask an edited message in place of it and of all that followed."""
        text, conversation = str(event.text).strip(), tab["conversation"]
        if (
            text
            and conversation
            and self.attempt(lambda: self.desk.store.conversations.truncate(conversation, int(event.id)))
        ):
            yield from self._question(request, tab, text, values)

    def retry(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Iterator[Changes]:
        """Answer the last question again, with the plugins that are on now, and compare with the answer before."""
        conversation = tab["conversation"]
        if conversation is None:
            return
        messages = self.messages(tab)
        last = messages[-1] if messages else None
        replaced = last if last is not None and last.role == "assistant" else None
        if replaced is not None:
            message_id = replaced.id
            self.attempt(lambda: self.desk.store.conversations.truncate(conversation, message_id))
        yield from self._answer(request, tab, values, replaced)

    def stop(self, request: gr.Request) -> Changes:
        self.desk.stop((str(request.session_hash), "answer"))
        return {self.ui.stop: gr.Button(interactive=False)}

    def _question(self, request: gr.Request, tab: Tab, text: str, values: Sequence[Any]) -> Iterator[Changes]:
        conversations = self.desk.store.conversations
        try:
            if tab["conversation"] is None:
                created = conversations.create(self.desk.engine.loader.source.name)
                tab = {"conversation": created.id, "documents": tab["documents"]}
                conversations.set_documents(created.id, tab["documents"])
            conversations.append(str(tab["conversation"]), "user", text)
        except PitlaneError as error:
            yield self.everything(tab) | {self.ui.live: error_html(str(error))}
            return
        yield {self.ui.box: ""}
        yield from self._answer(request, tab, values)

    def _answer(
        self, request: gr.Request, tab: Tab, values: Sequence[Any], replaced: Message | None = None
    ) -> Iterator[Changes]:
        """Answer a conversation's last message; `watch` draws it."""
        key = (str(request.session_hash), "answer")
        self.desk.stop((key[0], "reading"))  # what it computed so far is found in the cache
        writing = self.writing[key] = Writing(Live(), self.desk.documents(tab["documents"]))
        problem, shown = "", time.monotonic()
        yield self.everything(tab, answering=True) | {self.ui.live: _drawn(writing), **self.buttons(True)}
        try:
            ask = self._ask(values, replaced)
            for writing.live in self.desk.answer(key, str(tab["conversation"]), ask):
                if time.monotonic() - shown > ALIVE_SECONDS:
                    shown = time.monotonic()
                    yield {self.ui.box: gr.skip()}
        except PitlaneError as error:
            problem = error_html(str(error))
        finally:
            self.desk.stop(key)
            writing.is_over = True
        while writing.num_watching and time.monotonic() - shown < 2 * ALIVE_SECONDS:
            time.sleep(FRAME_SECONDS / 10)  # or its last frame would come behind this
        yield self.everything(tab) | {self.ui.live: problem, **self.buttons(False)}

    def watch(self, request: gr.Request) -> Iterator[Changes]:
        """Draw the answer that this tab is waiting for, until it is there."""
        writing = self.writing.get((str(request.session_hash), "answer"))
        if writing is None:
            return
        writing.num_watching += 1
        try:
            while not writing.is_over:
                yield {self.ui.live: _drawn(writing)}
                time.sleep(FRAME_SECONDS)
        finally:
            writing.num_watching -= 1

    # ---- plugins

    def toggled(self, card: Card) -> Callable[..., Changes]:
        """Handler of one card's switch and options: the plan of the next message, or why there is none."""

        def handler(*values: Any) -> Changes:
            controls = self.ui.controls
            try:
                plan = self.desk.engine.plan(controls.settings(values))
            except PitlaneError as error:
                settings = controls.settings(values)
                reason = controls.refusal(card, settings) or str(error)
                return {self.ui.plan: refusal_html(reason)} | self._revert(card, settings)
            self.desk.prepare(plan)
            return {self.ui.plan: plan_html(plan, plan.lane_key in self.desk.engine.lanes)}

        return handler

    def _revert(self, card: Card, settings: Settings) -> Changes:
        """Switch a refused plugin back if the plan is good without the change."""
        name = card.plugin.name
        enabled = name in settings
        other = {key: options for key, options in settings.items() if key != name} if enabled else settings | {name: {}}
        with suppress(PitlaneError):
            self.desk.engine.plan(other)
            return {card.switch: not enabled}
        return {}

    def _ask(self, values: Sequence[Any], replaced: Message | None = None) -> Ask:
        """Read sampling and plugin widgets. A retry with other plugins keeps the seed, so that answers compare."""
        temperature, top_p, max_tokens, seed, system, thinking = values[: len(self.ui.sampling)]
        settings = self.ui.controls.settings(values[len(self.ui.sampling) :])
        if (
            seed is None
            and replaced is not None
            and replaced.stats
            and list(replaced.stats["plugins"]) != sorted(settings)
        ):
            seed = seed_of(replaced)
        sampling = SamplingParams(
            max_tokens=int(max_tokens or 512),
            temperature=float(temperature),
            top_p=float(top_p),
            seed=None if seed is None else int(seed),
        )
        return Ask(settings, sampling, system.strip() or None, THINKING[thinking], replaced)


def _drawn(writing: Writing) -> str:
    return live_html(writing.live, writing.documents)
