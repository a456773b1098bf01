"""The data of sequence-level distillation (Kim and Rush 2016): chats and texts in the teacher's words.

An engine of its own runs the teacher, greedily. In a chat, the teacher gives every answer, after its own earlier answers. In a
text, the teacher continues every other piece. Chats run in parallel, and the turns of a chat share their KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pitlane import Engine, SamplingParams, Settings

MAX_ANSWER = 96  # tokens
PIECE = 400  # characters of a text before the teacher continues it
PARALLEL = 16  # chats and pieces of texts that run at a time


def teacher_answers(teacher: Path, device: str, records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, in order, chats with the teacher's answers, and every other piece of the texts with its continuation."""

    def plugins(default: Settings) -> Settings:
        return {**default, "prefix_cache": {"save_documents": False}}

    threads = torch.get_num_threads()  # the same number as the training that follows
    with (
        Engine(str(teacher), plugins=plugins, device=device, threads=threads) as engine,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        yield from pool.map(partial(_answered, engine), _parts(records))


def _parts(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield chats unchanged, and every other piece of the texts."""
    for record in records:
        if "messages" in record:
            yield record
        elif "text" in record:
            text = record["text"]
            yield from ({"text": text[start : start + PIECE]} for start in range(0, len(text), 2 * PIECE))


def _answered(engine: Engine, part: dict[str, Any]) -> dict[str, Any]:
    if "text" in part:
        return {"text": part["text"] + _continued(engine, engine.tokenizer.encode(part["text"]))}
    chat: list[dict[str, Any]] = []
    for message in part["messages"]:
        if message["role"] == "assistant":
            message = message | {"content": _continued(engine, engine.tokenizer.render_chat(chat).token_ids)}
        chat.append(message)
    return {"messages": chat}


def _continued(engine: Engine, token_ids: Sequence[int]) -> str:
    """Continue the last tokens of a prompt, as many as leave room for the answer in the context."""
    room = max(1, engine.loader.context - MAX_ANSWER)
    return engine.generate(list(token_ids[-room:]), SamplingParams(max_tokens=MAX_ANSWER)).text
