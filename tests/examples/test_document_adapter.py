"""The recipe of the document adapter: what its data holds, and three steps of its training on the bundled model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from bundled_model.docqa.phrases import UNKNOWN
from document_adapter import ordinary, recipe, written
from pitlane import SamplingParams
from pitlane.ui.cli import main

NUMBER = 20


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_document_chats_have_pages_several_turns_and_questions_without_an_answer() -> None:
    rows = list(recipe.documents(200))
    assert not any("The document says" in message["content"] for row in rows for message in row["messages"])
    assert len(rows) == 200 and all(row["messages"][0]["role"] == "system" for row in rows)
    answers = [message for row in rows for message in row["messages"] if message["role"] == "assistant"]
    kinds = Counter(message["kind"] for message in answers)
    assert 0.12 < kinds["unanswerable"] / len(answers) < 0.3
    assert all(message["content"] == UNKNOWN for message in answers if message["kind"] == "unanswerable")
    stated = [message for message in answers if "page" in message]
    assert len(stated) > 500 and all(re.search(r"\[p\. \d+\]", message["content"]) for message in stated)
    assert {message["page"] for message in stated} > {1, 2}, "documents of several pages"
    assert kinds["follow_up"] > 50 and sum(len(row["messages"]) > 7 for row in rows) > 60
    lengths = [len(row["messages"][0]["content"]) for row in rows]
    assert min(lengths) < 700 and max(lengths) > 1500
    assert not {row["messages"][0]["content"] for row in recipe.documents(50, "phrasing")} & {
        row["messages"][0]["content"] for row in rows
    }


def test_documents_by_hand_keep_their_format() -> None:
    documents = written.read()
    assert len(documents) == 330 and len({document.title for document in documents}) > 320
    answers = [turn.answer for document in documents for turn in document.turns]
    refused = answers.count(written.REFUSAL)
    assert len(answers) > 3500 and 0.2 < refused / len(answers) < 0.3
    for document in documents:
        for _, answer in document.turns:
            cited = [int(page) for page in written.CITATION.findall(answer)]
            assert (answer == written.REFUSAL) != bool(cited), (document.title, answer)
            text = " ".join(" ".join(document.pages[page - 1] for page in cited).split())
            numbers = re.findall(r"\d[\d.,:/]*\d|\d", written.CITATION.sub("", answer))
            assert all(number in text for number in numbers), (document.title, answer)


def test_a_broken_document_is_named() -> None:
    for text, reason in (
        ("=== a\n[p. 2]\nx\n---\nQ: q\nA: a\n", r"a: pages \[p. 1\]"),
        ("=== a\n[p. 1]\nx\nQ: q\nA: a\n", r"then ---"),
        ("=== a\n[p. 1]\nx\n---\nQ: q\nQ: a\n", "in turn"),
    ):
        with pytest.raises(ValueError, match=reason):
            written.parse(text)


def test_chats_about_documents_by_hand() -> None:
    pages = ["first", "second"]
    turns = [written.Turn("How much?", "7 euros [p. 2]."), written.Turn("And for it?", "8 euros [p. 1].")]
    long = written.joined([written.Written("a", pages, turns), written.Written("b", pages, turns)])
    assert long.title == "a" and long.pages == pages * 2
    assert [turn.answer for turn in long.turns[2:]] == ["7 euros [p. 4].", "8 euros [p. 3]."]
    assert [len(part) for part in written.groups(long.turns)] == [2, 2], "a follow-up stays behind its question"
    train, held_out = written.split(written.read())
    assert 20 < len(held_out) < 40 and not {document.title for document in held_out} & {
        document.title for document in train
    }
    rows = list(written.chats(train, 1))
    assert sum("[p. 5]" in row["messages"][0]["content"] for row in rows) > 10, "long documents"
    assert all(len(row["messages"]) <= 1 + 2 * written.TURNS for row in rows)


def test_ordinary_questions_differ() -> None:
    asked = [ordinary.questions(Random(seed)) for seed in range(300)]
    assert len({chat[0] for chat in asked}) > 150 and {len(chat) for chat in asked} == {1, 2, 3}
    assert all("{" not in text and len(text) > 3 for chat in asked for text in chat)


def test_answers_that_break_off_are_left_out(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("bundled", dtype="float32")
    whole = ordinary.answered(engine, ["Hello!", "Thank you"], 0)
    assert [message["role"] for message in whole] == ["user", "assistant"] * 2
    monkeypatch.setattr(ordinary, "MAX_ANSWER", 1)
    assert ordinary.answered(engine, ["Hello!"], 0) == []


@pytest.mark.slow
def test_three_steps_of_the_recipe(work: Path, make_engine: Any) -> None:
    files = recipe.write_data(work, "bundled", NUMBER)
    before = [path.read_bytes() for path in files]
    assert [path.name for path in files] == ["written.jsonl", "documents.jsonl", "ordinary.jsonl"]
    assert len(read(files[1])) == NUMBER and 0 < len(read(files[2])) <= 10
    assert all(row["messages"][0]["role"] == "user" for row in read(files[2]))
    assert recipe.write_data(work, "bundled", NUMBER) == files
    assert [path.read_bytes() for path in files] == before, "files that exist are kept"
    call = recipe.command(work, files, "bundled")
    small = ("--steps", "3", "--length", "1024", "--rows", "2", "--threads", "1", "--save-dtype", "float32")
    result = CliRunner().invoke(main, [*call, *small])
    assert result.exit_code == 0, result.stderr
    assert "step 3/3" in result.stderr and "--resume" not in call and "--resume" in recipe.command(work, files)
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("bundled", 16, 32)
    engine = make_engine("bundled", dtype="float32")
    plan = engine.plan({"lora": {"adapter": str(work / "adapter")}})
    answer, tuned = (engine.generate("Hello!", SamplingParams(max_tokens=1, logprobs=1), plan=p) for p in (None, plan))
    assert tuned.logprobs != answer.logprobs and tuned.stats["failed"] == {}
