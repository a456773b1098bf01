"""What the teacher says: the data of sequence-level distillation (Kim and Rush 2016), answered by an engine of its own.

Every answer of a chat is put in the teacher's words, each after its own answers before; of texts, the teacher continues every other
piece. All greedy. Chats run side by side, and the turns of one share its KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pitlane import Engine, SamplingParams

MAX_ANSWER = 96  # tokens
PIECE = 400  # characters of a text before the teacher goes on
PARALLEL = 16  # chats and texts at a time


def teacher_answers(teacher: Path, device: str, records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield chats with the teacher's answers, and every other piece of the texts with its continuation, in their order."""
    plugins: dict[str, Any] = {"prefix_cache": {"save_documents": False}}
    threads = torch.get_num_threads()  # as the training that follows
    with (
        Engine(str(teacher), plugins=plugins, device=device, threads=threads) as engine,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        yield from pool.map(partial(_answered, engine), _parts(records))


def _parts(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Chats as they are, and texts in pieces."""
    for record in records:
        if "messages" in record:
            yield record
        elif "text" in record:
            text = record["text"]
            yield from ({"text": text[at : at + PIECE]} for at in range(0, len(text), 2 * PIECE))


def _answered(engine: Engine, part: dict[str, Any]) -> dict[str, Any]:
    if "text" in part:
        return {"text": part["text"] + _continued(engine, engine.tokenizer.encode(part["text"]))}
    told: list[dict[str, Any]] = []
    for message in part["messages"]:
        if message["role"] == "assistant":
            message = message | {"content": _continued(engine, engine.tokenizer.render_chat(told).token_ids)}
        told.append(message)
    return {"messages": told}


def _continued(engine: Engine, token_ids: Sequence[int]) -> str:
    """What the teacher writes behind the last tokens that leave it room."""
    room = max(1, engine.loader.context - MAX_ANSWER)
    return engine.generate(list(token_ids[-room:]), SamplingParams(max_tokens=MAX_ANSWER)).text
