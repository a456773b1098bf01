"""Answers in the store: a complete answer at its place in the conversation, and what there is of an answer that is being written.

An answer that is being written is kept once a second. If the process is killed, the next process puts what was kept at the place
of the answer, marked as interrupted. Knows no Gradio and no HTML. `Desk` (ui/answering.py) extends `Answers`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from pitlane import EXACTNESS, Engine, Plan, Result, SamplingParams
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound, StorageError
from pitlane.storage.types import Conversation, UnfinishedAnswer
from pitlane.ui.ask import Ask
from pitlane.ui.chat_flow import INTERRUPTED, compare
from pitlane.ui.effects import droppers_of
from pitlane.ui.library import Library
from pitlane.ui.panels import Live, last_stats
from pitlane.ui.waterfall import MAX_SPANS, first_difference_of

KEPT_PROMPTS = 16  # to say where a prompt differs from an earlier prompt
DIFFERING_TOKENS = 6  # that are shown as text
KEEP_SECONDS = 1.0  # between two copies of an answer that is being written: a write to disk takes some milliseconds


class Answers(Library):
    """Stores answers of one engine in one store."""

    def __init__(self, engine: Engine, store: Store) -> None:
        super().__init__(engine, store)
        self._prompts: deque[list[int]] = deque(maxlen=KEPT_PROMPTS)  # with their answers

    def save(
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
        if result.stats["accepted_tokens"] and ask.continued is None:
            stats["accepted_text"] = self._characters(result, accepted)
        old = ask.replaced
        if old is not None and old.stats and old.token_ids is not None and old.stats.get("model") == stats["model"]:
            stats["compared"] = compare(old.token_ids, old.stats, result.token_ids, stats)
        before = last_stats(conversation.messages)
        if (
            before is not None and ask.continued is None
        ):  # a plugin's dropped tokens are visible again: all was read again
            stats["read_again"] = [name for name in droppers_of(before) if name not in stats["plugins"]]
        place(self.store, self._placed(conversation.id, ask, result.text, result.token_ids, stats))

    def keep(
        self, conversation_id: str, ask: Ask, plan: Plan, sampling: SamplingParams, live: Live, seconds: float
    ) -> None:
        """Keep what there is of an answer, with stats by the clock of the page. seconds: since the answer was asked for.

        A full disk does not end the answer.
        """
        if not live.num_tokens:
            return
        decode_ms = 1e3 * (time.perf_counter() - live.first_token)
        rate = 1e3 * (live.num_tokens - 1) / decode_ms if live.num_tokens > 1 and decode_ms > 0 else None
        first_ms = max(0.0, 1e3 * seconds - decode_ms)
        stats = self.engine.loader.describe() | {
            "plugins": plan.settings,
            "exactness": plan.exactness,
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "finish_reason": INTERRUPTED,
            "prompt_tokens": live.total,
            "cached_tokens": live.cached,
            "completion_tokens": live.num_tokens,
            "queue_ms": 0.0,
            "prefill_ms": round(first_ms, 3),
            "ttft_ms": round(first_ms, 3),
            "decode_ms": round(decode_ms, 3),
            "tpot_ms": {"p50": None, "p95": None},
            "tokens_per_second": rate and round(rate, 2),
            "draft_tokens": 0,
            "accepted_tokens": 0,
            **{name: {} for name in ("plugin_ms", "bought_ms", "paused", "failed", "notes")},
        }
        try:
            self.store.unfinished.keep(self._placed(conversation_id, ask, live.text, live.token_ids, stats))
        except StorageError as error:
            logging.getLogger(__name__).warning("the unfinished answer is not kept: %s", error)

    def restore(self) -> None:
        """Put the answers of processes that no longer run at their places, marked as interrupted."""
        for answer in self.store.unfinished.list():
            if not _runs(answer.writer):
                with suppress(NotFound):
                    place(self.store, answer)

    def reuse(self, token_ids: list[int]) -> dict[str, Any] | None:
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

    def remember(self, prompt: Sequence[int], result: Result) -> None:
        """Keep a prompt with its answer, for `reuse`."""
        self._prompts.append([*prompt, *result.token_ids])

    def _placed(
        self, conversation_id: str, ask: Ask, text: str, token_ids: Sequence[int], stats: dict[str, Any]
    ) -> UnfinishedAnswer:
        """An answer with its place. Of a continued answer: both parts, decoded anew, because a cut may divide a character."""
        old, changed = ask.continued, ask.changed
        if old is not None:
            stats |= plan_of_both(old.stats or {}, stats) | {"continued_after": len(old.token_ids or ())}
            is_complete = not text.endswith("\ufffd")  # the end of an incomplete character; an answer leaves it out
            token_ids = [*(old.token_ids or ()), *token_ids]
            text = self.engine.tokenizer.decode(token_ids)
            text = text.rstrip("\ufffd") if is_complete else text
        return UnfinishedAnswer(
            conversation_id,
            writer(),
            text,
            tuple(token_ids),
            stats,
            changed.id if changed is not None else None,
            ask.text if ask.edited is not None else None,
            old.id if old is not None else None,
        )

    def _characters(self, result: Result, ranges: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The characters of the text that ranges of tokens produced."""
        tokenizer, last = self.engine.tokenizer, len(result.text)

        def position(num_tokens: int) -> int:
            return min(len(tokenizer.decode(result.token_ids[:num_tokens]).rstrip("\ufffd")), last)

        return [[position(start), position(stop)] for start, stop in ranges[:MAX_SPANS]]


def place(store: Store, answer: UnfinishedAnswer) -> None:
    """Store an answer as a message, and remove its row of unfinished answers."""
    conversations, key = store.conversations, answer.conversation_id
    with store.transaction():
        store.unfinished.forget(key)
        if answer.continued is not None:
            conversations.extend(key, answer.continued, answer.text, answer.token_ids, answer.stats)
            return
        if answer.changed is not None:
            conversations.branch(key, answer.changed)
        if answer.question is not None:
            conversations.append(key, "user", answer.question)
        conversations.append(key, "assistant", answer.text, token_ids=answer.token_ids, stats=answer.stats)


def writer() -> str:
    """This process, by a name that no later process has."""
    process = psutil.Process()
    return f"{process.pid} {process.create_time():.2f}"


def _runs(name: str) -> bool:
    """Whether a process named by `writer` runs."""
    try:
        return f"{psutil.Process(int(name.split()[0])).create_time():.2f}" == name.split()[1]
    except (psutil.Error, ValueError, IndexError):
        return False


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
