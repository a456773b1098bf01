"""Requests of the page to the engine: answers, and the KV of documents computed before the first question.

Knows no Gradio and no HTML. One `Desk` serves all tabs. A request has a key by which it is stopped. The key of an answer is its
conversation, so every tab that shows the conversation can stop the answer. The key of a prefill is its tab.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Lock, Thread
from typing import Any, NamedTuple

from pitlane import EXACTNESS, Engine, Plan, PrefillProgress, Prompt, Result, SamplingParams, Stream, TextDelta
from pitlane.storage.conversations import turns
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.storage.types import Conversation, Message, Refusal
from pitlane.ui import document_plugins
from pitlane.ui.chat_flow import compare
from pitlane.ui.effects import droppers_of
from pitlane.ui.library import Library
from pitlane.ui.panels import Live, last_stats
from pitlane.ui.sampling import Sampling
from pitlane.ui.session import Chat
from pitlane.ui.waterfall import MAX_SPANS, first_difference_of

Key = tuple[str, str]
KEPT_PROMPTS = 16  # to say where a prompt differs from an earlier prompt
DIFFERING_TOKENS = 6  # that are shown as text


@dataclass(frozen=True, slots=True)
class Ask:
    """How to answer a question. The question is the conversation's last message, except in two cases.

    settings: of the plugins in effect, so without document plugins if there is no document.
    replaced: this answer is generated again. edited: `text` replaces this question. The replaced messages are shown until the new
    answer is complete; then they are versions to go back to. continued: this answer was cut and goes on.
    """

    settings: Mapping[str, Mapping[str, Any]]
    sampling: Sampling
    system: str | None = None
    thinking: bool | None = None
    replaced: Message | None = None
    edited: Message | None = None
    continued: Message | None = None
    text: str = ""

    def messages(self, conversation: Conversation) -> tuple[Message, ...]:
        """The messages to answer: the messages before the change, and the new question."""
        changed = self.edited or self.replaced or self.continued
        if changed is None:
            return conversation.messages
        kept = tuple(message for message in conversation.messages if message.id < changed.id)
        if self.edited is None:
            return kept
        return (*kept, Message(0, conversation.id, "user", self.text, None, None, time.time()))


class Reading(NamedTuple):
    """Progress of documents. share: the computed share of their KV. left_out: plugins that do not fit, with the reason."""

    share: float
    left_out: Mapping[str, str]


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


class Desk(Library):
    """Serves every tab of the page from one engine and one store."""

    def __init__(self, engine: Engine, store: Store) -> None:
        super().__init__(engine, store)
        self.roles = {entry.name: entry.plugin.role for entry in engine.registry if entry.plugin}
        self._running: dict[Key, Running] = {}
        self._prompts: deque[list[int]] = deque(maxlen=KEPT_PROMPTS)  # with their answers
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
        with self._requested(key) as running:
            conversation = self.store.conversations.get(conversation_id)
            chat = self._chat(conversation.document_ids, turns(ask.messages(conversation)), ask.system, ask.thinking)
            plan = self.engine.plan(ask.settings)
            live = Live(loading=not self.engine.is_loaded(plan))
            yield live
            plan, left_out = document_plugins.load(self.engine, ask.settings)
            prompt, recommended = _begun(chat.prompt(), ask.continued), self.engine.loader.source.sampling
            sampling = ask.sampling.params(recommended, is_chat=not chat.documents)
            stream = self.engine.submit(prompt, sampling, plan=plan)
            running.follow(stream)
            live.total, live.segments = len(prompt.token_ids), prompt.segments
            try:
                yield live
                yield from _followed(stream, live)
            except GeneratorExit:  # the tab was closed
                stream.abort()
                with suppress(PitlaneError):
                    self._save(conversation, ask, sampling, stream.result(), left_out)
                raise
            if live.result is not None:
                reuse = self._reuse(prompt.token_ids)
                live.result.stats.update({"reuse": reuse} if reuse else {})
                self._prompts.append([*prompt.token_ids, *live.result.token_ids])
                self._save(conversation, ask, sampling, live.result, left_out, live.accepted)

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

    def _save(
        self,
        conversation: Conversation,
        ask: Ask,
        sampling: SamplingParams,
        result: Result,
        left_out: Mapping[str, str],
        accepted: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Store an answer as another version of the messages that it replaces, or at the end of the answer that it continues.

        Drop it if it was stopped before its first token.
        """
        stats = result.stats | {"finish_reason": result.finish_reason, "temperature": sampling.temperature}
        stats["failed"] = {**stats["failed"], **left_out}
        self.store.runs.add(stats)
        if was_stopped_before_it_began(result):
            return
        if ask.continued is not None:
            self._extend(ask.continued, result, stats)
            return
        if result.stats["accepted_tokens"]:
            stats["accepted_text"] = self._characters(result, accepted)
        old = ask.replaced
        if old is not None and old.stats and old.token_ids is not None and old.stats.get("model") == stats["model"]:
            stats["compared"] = compare(old.token_ids, old.stats, result.token_ids, stats)
        before = last_stats(conversation.messages)
        if before is not None:  # tokens that a plugin had dropped are visible again, so the whole text was read again
            stats["read_again"] = [name for name in droppers_of(before) if name not in stats["plugins"]]
        conversations, changed = self.store.conversations, ask.edited or ask.replaced
        with self.store.transaction():
            if changed is not None:
                conversations.branch(conversation.id, changed.id)
            if ask.edited is not None:
                conversations.append(conversation.id, "user", ask.text)
            conversations.append(conversation.id, "assistant", result.text, token_ids=result.token_ids, stats=stats)

    def _characters(self, result: Result, ranges: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The characters of the text that ranges of tokens produced."""
        tokenizer, last = self.engine.tokenizer, len(result.text)

        def place(num_tokens: int) -> int:
            return min(len(tokenizer.decode(result.token_ids[:num_tokens]).rstrip("\ufffd")), last)

        return [[place(start), place(stop)] for start, stop in ranges[:MAX_SPANS]]

    def _reuse(self, token_ids: list[int]) -> dict[str, Any] | None:
        """Where a prompt differs from the earlier prompt that it shares most with: the number of equal tokens, and both texts."""
        difference = first_difference_of(token_ids, list(self._prompts))
        if difference is None:
            return None
        same, before = difference
        now, then = (
            self.engine.tokenizer.decode(ids[same : same + DIFFERING_TOKENS], skip_special_tokens=False)
            for ids in (token_ids, before)
        )
        return {"same": same, "now": now.strip("\ufffd"), "before": then.strip("\ufffd")}

    def _extend(self, old: Message, result: Result, stats: dict[str, Any]) -> None:
        """Add the tokens of a result to the answer that it continues. The text is decoded anew: a cut may divide a character."""
        token_ids = [*(old.token_ids or ()), *result.token_ids]
        stats |= plan_of_both(old.stats or {}, stats) | {"continued_after": len(token_ids) - len(result.token_ids)}
        text = self.engine.tokenizer.decode(token_ids)
        if not result.text.endswith("\ufffd"):  # the end of an incomplete character; an answer leaves it out
            text = text.rstrip("\ufffd")
        self.store.conversations.extend(old.conversation_id, old.id, text, token_ids, stats)

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


def seed_of(message: Message | None) -> int | None:
    """The seed of an answer, for a comparison with the same seed."""
    return int(message.stats["seed"]) if message is not None and message.stats else None


def plan_of_both(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The plugins and the promises of an answer of two parts, from the stats of its parts.

    It has the plugins of both parts, the later part's first, and keeps only what both parts promise.
    """
    classes = [str(stats["exactness"]) for stats in (before, after) if "exactness" in stats]
    return {
        "plugins": {**after["plugins"], **before.get("plugins", {}), **after["plugins"]},
        "exactness": max(classes, key=list[str](EXACTNESS).index),
        "batch_invariant": all(stats.get("batch_invariant", True) for stats in (before, after)),
    }


def was_stopped_before_it_began(result: Result) -> bool:
    """Whether a request was stopped before its first token."""
    return result.finish_reason == "aborted" and not result.token_ids


def _followed(stream: Stream, live: Live) -> Iterator[Live]:
    """Update `live` from every event of a stream."""
    first = 0.0
    for event in stream:
        live.loading = False
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
            if (
                len(event.token_ids) > 1
            ):  # the last token of a step is the model's own, the tokens before it were drafted
                live.accepted.append((live.num_tokens, live.num_tokens + len(event.token_ids) - 1))
            live.num_tokens += len(event.token_ids)
            elapsed = now - first
            live.tokens_per_second = (live.num_tokens - 1) / elapsed if elapsed > 0.2 else None
        else:
            live.result = event.result
            return
        yield live
