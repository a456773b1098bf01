"""What the page does with the engine and the store: documents in, answers out, and which request belongs to which tab.

Knows no Gradio and no HTML. One `Desk` serves all tabs; a request is known by a key (the tab and what it is for), so that
a tab can stop its own and nobody else's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from pitlane.engine.documents import load_document
from pitlane.engine.engine import Engine
from pitlane.engine.errors import PromptTooLong
from pitlane.engine.plan import Plan
from pitlane.engine.stream import Stream
from pitlane.engine.types import PrefillProgress, Result, SamplingParams, TextDelta
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Conversation, Document, Message, StoredDocument
from pitlane.ui.chat_flow import compare
from pitlane.ui.panels import DocumentRow, Live, counted
from pitlane.ui.session import Chat

SAMPLE = "sample.pdf"
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """How one question is to be answered. replaced: the answer that is asked for again."""

    settings: Mapping[str, Mapping[str, Any]]
    sampling: SamplingParams
    system: str | None = None
    thinking: bool | None = None
    replaced: Message | None = None


class Desk:
    """Serves every tab of the page from one engine and one store."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self.engine = engine
        self.store = store
        self.roles = {entry.name: entry.plugin.role for entry in engine.registry if entry.plugin}
        self._running: dict[Key, Stream] = {}
        self._lock = Lock()
        self._documents: dict[str, Document] = {}
        self._tokens: dict[str, int] = {}

    # ---- documents

    def add_file(self, path: str | Path, title: str | None = None) -> StoredDocument:
        """Read a file into the store. Raises DocumentError with one line for people."""
        return self.store.documents.add(load_document(path, title=title))

    def add_sample(self) -> StoredDocument:
        """Put the bundled sample into the store."""
        with as_file(files("pitlane.storage.bundled") / SAMPLE) as path:
            return self.add_file(path, SAMPLE)

    def has_sample(self) -> bool:
        """Whether the sample is in the store."""
        return any(row.title == SAMPLE for row in self.store.documents.list())

    def document(self, document_id: str) -> Document:
        """A stored document with its pages."""
        if document_id not in self._documents:
            self._documents[document_id] = self.store.documents.load(document_id)
        return self._documents[document_id]

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Those of the documents that are still stored."""
        found = []
        for document_id in ids:
            with suppress(NotFound):
                found.append(self.document(document_id))
        return found

    def num_tokens(self, document_id: str) -> int:
        """Tokens of a document as it stands in a prompt."""
        if document_id not in self._tokens:
            self._tokens[document_id] = len(self.engine.tokenizer.encode(self.document(document_id).text, False))
        return self._tokens[document_id]

    def rows(self, attached: Sequence[str], reading: Mapping[str, float] | None = None) -> list[DocumentRow]:
        """The document list of a tab. Tokens are counted for what is attached, and known for what once was."""
        for document_id in attached:
            with suppress(NotFound):
                self.num_tokens(document_id)
        stored, prefixes = self.store.documents.list(), self.store.prefixes.list()
        return counted(stored, attached, self._tokens.get, prefixes, reading or {})

    def forget(self, document_id: str) -> None:
        """Remove a document with its saved KV."""
        self.store.documents.remove(document_id)
        self._documents.pop(document_id, None)

    def prefill(self, key: Key, document_ids: Sequence[str], ask: Ask) -> Iterator[float]:
        """Compute the KV of documents ahead of the first question; the share that is done. Stopped by `stop(key)`."""
        chat = self._chat(document_ids, [{"role": "user", "content": "."}], ask.system)
        plan = self.engine.plan(ask.settings)
        if "match_prefix" not in plan.hooks:  # nothing would keep what is computed
            return
        stream = self.engine.submit(chat.prompt(), replace(ask.sampling, max_tokens=1), plan=plan)
        with self._registered(key, stream):
            for event in stream:
                if isinstance(event, PrefillProgress):
                    yield event.num_computed_tokens / event.num_prompt_tokens

    def prepare(self, plan: Plan) -> None:
        """Open a plan's lane in the background, if its weights are there: the next answer need not wait for timed forwards."""

        def open_lane() -> None:
            with suppress(PitlaneError):  # it is raised, and shown, when somebody asks
                self.engine.lane_of(plan)

        if plan.lane_key in self.engine.lanes:
            Thread(target=open_lane, daemon=True).start()

    # ---- conversations

    def used_tokens(
        self, messages: Sequence[Message], document_ids: Sequence[str], system: str | None
    ) -> tuple[int, int]:
        """Tokens that a conversation takes in the context, and how many of them are documents'."""
        chat = self._chat(document_ids, _turns(messages), system)
        prompt = chat.prompt() if chat.messages or chat.documents else None
        inside = sum(segment.end - segment.start for segment in prompt.segments) if prompt else 0
        return (len(prompt.token_ids) if prompt else 0), inside

    def check_fits(self, document_ids: Sequence[str]) -> None:
        """Raise PromptTooLong, with both numbers, if the documents alone leave no room for a question."""
        total, context = sum(map(self.num_tokens, document_ids)), self.engine.loader.context
        if total >= context:
            raise PromptTooLong(
                f"the attached documents have {total} tokens and the context of {self.engine.loader.source.name} holds "
                f"{context} with question and answer; take one out, use a shorter one, or start with another --model"
            )

    def answer(self, key: Key, conversation_id: str, ask: Ask) -> Iterator[Live]:
        """Answer the last message of a conversation, with every event; what there is at the end is stored."""
        conversation = self.store.conversations.get(conversation_id)
        chat = self._chat(conversation.document_ids, _turns(conversation.messages), ask.system, ask.thinking)
        plan = self.engine.plan(ask.settings)
        live = Live(loading=plan.lane_key not in self.engine.lanes)
        yield live
        prompt = chat.prompt()
        live.loading, live.total = False, len(prompt.token_ids)
        stream = self.engine.submit(prompt, ask.sampling, plan=plan)
        yield live
        with self._registered(key, stream):
            try:
                yield from _followed(stream, live)
            finally:
                stream.abort()
                with suppress(PitlaneError, AssertionError):  # an error was raised to the caller already
                    self._save(conversation, ask, stream.result() if live.result is None else live.result)

    def stop(self, key: Key) -> None:
        """Stop the compute of a tab's request; its reader gets what there is."""
        with self._lock:
            stream = self._running.get(key)
        if stream is not None:
            stream.abort()

    def is_running(self, key: Key) -> bool:
        with self._lock:
            return key in self._running

    def _save(self, conversation: Conversation, ask: Ask, result: Result) -> None:
        stats = result.stats | {"finish_reason": result.finish_reason, "temperature": ask.sampling.temperature}
        self.store.runs.add(stats)
        old = ask.replaced
        if old is not None and old.stats and old.token_ids is not None:
            stats["compared"] = compare(old.token_ids, old.stats, result.token_ids, stats)
        with suppress(NotFound):  # deleted meanwhile, in this window or in another
            self.store.conversations.append(
                conversation.id, "assistant", result.text, token_ids=result.token_ids, stats=stats
            )

    def _chat(
        self,
        document_ids: Sequence[str],
        messages: list[dict[str, str]],
        system: str | None,
        thinking: bool | None = None,
    ) -> Chat:
        chat = Chat(self.engine.tokenizer, system or None, thinking, messages=messages)
        for document_id in document_ids:
            with suppress(NotFound):
                chat.add(self.document(document_id), self.store.documents.get(document_id))
        return chat

    @contextmanager
    def _registered(self, key: Key, stream: Stream) -> Iterator[None]:
        with self._lock:
            self._running[key] = stream
        try:
            yield
        finally:
            with self._lock:
                if self._running.get(key) is stream:
                    del self._running[key]
            stream.abort()


def seed_of(message: Message | None) -> int | None:
    """The seed an answer was made with, to be used again for a comparison."""
    return int(message.stats["seed"]) if message is not None and message.stats else None


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def _followed(stream: Stream, live: Live) -> Iterator[Live]:
    """Fold each event into `live`."""
    first = 0.0
    for event in stream:
        if isinstance(event, PrefillProgress):
            live.done, live.total, live.cached = (
                event.num_computed_tokens,
                event.num_prompt_tokens,
                event.num_cached_tokens,
            )
        elif isinstance(event, TextDelta):
            now = time.perf_counter()
            first = first or now
            live.text += event.text
            live.num_tokens += len(event.token_ids)
            elapsed = now - first
            live.tokens_per_second = (live.num_tokens - 1) / elapsed if elapsed > 0.2 else None
        else:
            live.result = event.result
            return
        yield live
