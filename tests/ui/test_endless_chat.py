"""A chat under attention sinks that outgrows the context, through the code of the page: docs/endless_chat.py in short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pitlane.storage.db import Store
from pitlane.ui.answering import Desk


@pytest.fixture
def script() -> Any:
    path = Path(__file__).resolve().parents[2] / "docs" / "endless_chat.py"
    spec = importlib.util.spec_from_file_location("endless_chat", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_chat_outgrows_the_context_and_never_replays_its_history(make_engine: Any, script: Any) -> None:
    """The default plan and sampling of the page. Every turn takes the earlier turns from the cache, up to a block."""
    context, count = 256, 14
    engine = make_engine("bundled", plugins=None, context=context)
    sinks, given = {"num_sinks": 4, "window": 96, "stride": 32}, {"max_tokens": 24}
    with Store() as store:
        turns = list(script.talk(engine, Desk(engine, store), count, sinks, given))
        (conversation,) = store.conversations.list()
        assert len(store.conversations.get(conversation.id).messages) == 2 * count
    assert [turn["turn"] for turn in turns] == list(range(1, count + 1))
    assert all(turn["answer"] and turn["end"] in ("stop", "length") for turn in turns)
    total = turns[-1]["prompt_tokens"] + turns[-1]["completion_tokens"]
    assert total > context, "the chat goes on behind the context"
    assert all(turn["replayed"] <= 32 for turn in turns), [turn["replayed"] for turn in turns]
    assert all(turn["cached_tokens"] > 0 for turn in turns[1:])
    dropped = [turn["dropped_tokens"] for turn in turns]
    assert dropped == sorted(dropped) and dropped[0] == 0 and dropped[-1] >= total - 4 - 96 - 32
    text = script.transcript("bundled", context, turns)
    assert text.count("\n**") == count and f"the chat ends with {total:,} tokens" in text.replace("\n", " ")


def test_the_questions_of_neighbouring_turns_differ(script: Any) -> None:
    asked = list(script.questions(200))
    assert len(set(asked)) == 200
    assert all(topic.split()[-1] in question for topic, question in zip(script.TOPICS, asked[::5], strict=True))
