"""Requests of the page to the engine: answers, and the KV of documents computed before the first question.

Knows no Gradio and no HTML. One `Desk` serves all tabs. A request has a key by which it is stopped. The key of an answer is its
conversation, so every tab that shows the conversation can stop the answer. The key of a prefill is its tab.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock, Thread
from typing import NamedTuple

from pitlane import Engine, Plan, PrefillProgress, Prompt, SamplingParams, Stream, TextDelta
from pitlane.storage.conversation_rows import turns
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Message, Refusal
from pitlane.ui import document_plugins
from pitlane.ui.answers import KEEP_SECONDS, Answers
from pitlane.ui.ask import Ask
from pitlane.ui.panels import Live
from pitlane.ui.session import Chat

Key = tuple[str, str]
READ_SECONDS = 0.03  # between two reads of a stream: each read takes the interpreter's lock from the engine


class Reading(NamedTuple):
    """Progress of documents. share: the computed share of their KV. left_out: plugins that do not fit, with the reason."""

    share: float
    left_out: Mapping[str, str]


@dataclass(slots=True)
class Load:
    """The load of weights for a question, by the clock of `time.perf_counter`.

    began: 0 if nothing was loaded. ended: 0 until the end.
    """

    began: float = 0.0
    ended: float = 0.0

    def stats(self, submitted: float, queue_ms: float) -> dict[str, float]:
        """`load_ms`, and `waited_ms`: the time in the queue without the load. submitted: the engine took the question."""
        if not self.ended:
            return {}
        in_queue = 1e3 * max(0.0, self.ended - submitted)
        return {
            "load_ms": round(1e3 * (self.ended - self.began), 3),
            "waited_ms": round(max(0.0, queue_ms - in_queue), 3),
        }


@dataclass(slots=True)
class Running:
    """A request of the page. It has no stream until the engine has accepted it."""

    stream: Stream | None = None
    is_stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    def follow(self, stream: Stream) -> None:
        """Take the request's stream; abort it if `stop` was called before."""
        with self._lock:
            self.stream = stream
            if self.is_stopped:
                stream.abort()

    def stop(self) -> None:
        """Abort the request; its reader gets the text so far."""
        with self._lock:
            self.is_stopped = True
            if self.stream is not None:
                self.stream.abort()


class Desk(Answers):
    """Serves every tab of the page from one engine and one store."""

    def __init__(self, engine: Engine, store: Store) -> None:
        super().__init__(engine, store)
        self.roles = {entry.name: entry.plugin.role for entry in engine.registry if entry.plugin}
        self._running: dict[Key, Running] = {}
        self._lock = Lock()

    # ---- requests

    def begin(self, key: Key) -> Running:
        """Register a request, so that `stop` reaches it before the engine has accepted it."""
        with self._lock:
            running = self._running[key] = Running()
        return running

    def stop(self, key: Key) -> None:
        """Abort the request of this key; its reader gets the text so far."""
        with self._lock:
            running = self._running.get(key)
        if running is not None:
            running.stop()

    @contextmanager
    def _requested(self, key: Key) -> Iterator[Running]:
        """Register a request, unless `begin` has done so, and remove it at the end of the block."""
        with self._lock:
            running = self._running.setdefault(key, Running())
        try:
            yield running
        finally:
            with self._lock:
                if self._running.get(key) is running:
                    del self._running[key]
            running.stop()

    # ---- documents

    def prefill(self, key: Key, document_ids: Sequence[str], ask: Ask) -> Iterator[Reading]:
        """Load the weights for a question about documents, and compute the KV of the documents. `stop(key)` ends it."""
        self.begin(key)
        with self._requested(key) as running:
            yield Reading(0.0, {})
            plan, left_out = document_plugins.load(self.engine, ask.settings)
            yield Reading(0.0, left_out)
            if running.is_stopped or "match_prefix" not in plan.hooks:  # no plugin of the plan would keep the KV
                return
            chat = self._chat(document_ids, [{"role": "user", "content": "."}], ask.system)
            stream = self.engine.submit(chat.prompt(), ask.sampling.changed(max_tokens=1).greedy(), plan=plan)
            running.follow(stream)
            for event in stream:
                if isinstance(event, PrefillProgress):
                    yield Reading(event.num_computed_tokens / event.num_prompt_tokens, left_out)

    def prepare(self, plan: Plan) -> None:
        """Open a plan's lane in the background if its weights are loaded, so that the next answer need not wait for it."""

        def open_lane() -> None:
            with suppress(PitlaneError):  # the next question raises it again, and the page shows it then
                self.engine.lane_of(plan)

        if self.engine.is_loaded(plan):
            Thread(target=open_lane, daemon=True).start()

    def _timed_load(self, plan: Plan) -> Load:
        """Take the time until the lane of a plan is open. A thread of its own waits, so that a stop need not."""
        load = Load(time.perf_counter())

        def wait() -> None:
            with suppress(PitlaneError):  # the question itself raises it
                self.engine.lane_of(plan)
                load.ended = time.perf_counter()

        Thread(target=wait, name="pitlane-load", daemon=True).start()
        return load

    # ---- conversations

    def used_tokens(
        self, messages: Sequence[Message], document_ids: Sequence[str], system: str | None
    ) -> tuple[int, int]:
        """Tokens of a conversation in the context, and the number of them that belong to documents."""
        chat = self._chat(document_ids, turns(messages), system)
        prompt = chat.prompt() if chat.messages or chat.documents else None
        if prompt is None:
            return 0, 0
        return len(prompt.token_ids), sum(segment.end - segment.start for segment in prompt.segments)

    def answer(self, key: Key, conversation_id: str, ask: Ask) -> Iterator[Live]:
        """Answer a question. Yields its state after every event, then stores the answer.

        Raises PitlaneError if there is no answer; the conversation then stays unchanged.
        """
        asked = time.perf_counter()
        with self._requested(key) as running:
            conversation = self.store.conversations.get(conversation_id)
            chat = self._chat(conversation.document_ids, turns(ask.messages(conversation)), ask.system, ask.thinking)
            plan = self.engine.plan(ask.settings)
            live = Live(loading=not self.engine.is_loaded(plan))
            live.recipe = partial(self.engine.loader.recipe_of, plan)
            load = self._timed_load(plan) if live.loading else Load()
            yield live
            plan, left_out = document_plugins.load(self.engine, ask.settings)
            prompt = _begun(chat.prompt(), ask.continued)
            sampling = _seeded(ask.sampling.params(self.engine.loader.source.sampling, is_chat=not chat.documents))
            stream = self.engine.submit(prompt, sampling, plan=plan)
            submitted = time.perf_counter()
            running.follow(stream)
            live.total, live.segments = len(prompt.token_ids), prompt.segments
            kept = time.perf_counter()
            try:
                yield live
                for _ in _followed(stream, live):
                    if time.perf_counter() - kept > KEEP_SECONDS:
                        kept = time.perf_counter()
                        self.keep(conversation.id, ask, plan, sampling, live, kept - asked)
                    yield live
            except GeneratorExit:  # the tab was closed
                stream.abort()
                with suppress(PitlaneError):
                    self.save(conversation, ask, sampling, stream.result(), left_out)
                raise
            finally:
                if live.result is None:  # an answer that is stored removes its row itself
                    with suppress(PitlaneError):
                        self.store.unfinished.forget(conversation.id)
            if live.result is not None:
                reuse = self.reuse(prompt.token_ids)
                live.result.stats.update({"reuse": reuse} if reuse else {})
                live.result.stats.update(load.stats(submitted, live.result.stats["queue_ms"]))
                self.remember(prompt.token_ids, live.result)
                self.save(conversation, ask, sampling, live.result, left_out, live.accepted)

    def refuse(self, conversation_id: str, ask: Ask, refusal: Refusal) -> None:
        """Store why a question has no answer. A refused edit is appended after the messages that it would have replaced."""
        conversations = self.store.conversations
        with self.store.transaction():
            last = conversations.get(conversation_id).messages[-1]
            if ask.edited is not None:
                if ask.edited.id == last.id:  # the original question has no answer either
                    conversations.truncate(conversation_id, last.id)
                last = conversations.append(conversation_id, "user", ask.text)
            conversations.refuse(conversation_id, last.id, refusal)

    def prompt(
        self, document_ids: Sequence[str], messages: list[dict[str, str]], system: str | None, thinking: bool | None
    ) -> Prompt:
        """The prompt of an answer to these messages."""
        return self._chat(document_ids, messages, system, thinking).prompt()

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


def _begun(prompt: Prompt, continued: Message | None) -> Prompt:
    """The prompt with the tokens of the answer that is continued."""
    if continued is None:
        return prompt
    return replace(prompt, token_ids=[*prompt.token_ids, *(continued.token_ids or ())])


def _seeded(sampling: SamplingParams) -> SamplingParams:
    """Sampling with a seed. Without one, the engine would draw a seed that is known only at the end of the answer."""
    return sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(63))


def _followed(stream: Stream, live: Live) -> Iterator[Live]:
    """Update `live` from every event of a stream. When no event is left, sleep, so that the engine runs undisturbed meanwhile."""
    for event in stream:
        live.loading = False
        if isinstance(event, PrefillProgress):
            live.done, live.total, live.cached = (
                event.num_computed_tokens,
                event.num_prompt_tokens,
                event.num_cached_tokens,
            )
        elif isinstance(event, TextDelta):
            live.add(event, time.perf_counter())
        else:
            live.result = event.result
            return
        yield live
        if live.num_tokens and stream.is_empty:  # the first token is read at once: its time counts
            time.sleep(READ_SECONDS)
