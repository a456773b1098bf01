"""The document question generator: seeds, values on the cited pages, unanswerable questions, files of conversations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bundled_model.docqa import generate
from bundled_model.docqa.asking import with_pronoun
from bundled_model.docqa.chat import GENERAL_QUESTIONS, filled, small_talk
from bundled_model.docqa.document import Document, document_message, make_document
from bundled_model.docqa.domains import SPLITS, domains
from bundled_model.docqa.facts import GLUE, Entity
from bundled_model.docqa.phrases import UNKNOWN
from bundled_model.docqa.questions import Interview, Turn, is_answerable

KINDS = {"fact", "yes_no", "list", "count", "comparison", "follow_up", "unanswerable"}
Seeded = tuple[Document, list[Turn]]


def one_line(text: str) -> str:
    return " ".join(text.split())


def drawn(seed: int, split: str = "train") -> Seeded:
    rng = Random(seed)
    pool = domains(split)
    document = make_document(rng, rng.choice((150, 400, 1000, 2000, 6000)), rng.random() < 0.4, pool)
    return document, Interview(rng, document, pool, 0.3).turns(12)


@pytest.fixture(params=range(60))
def seeded(request: pytest.FixtureRequest) -> Seeded:
    return drawn(request.param, SPLITS[request.param % len(SPLITS)])


def test_equal_seeds_give_equal_documents() -> None:
    assert drawn(5)[0].pages == drawn(5)[0].pages
    assert drawn(5)[1] == drawn(5)[1]
    assert drawn(5)[0].pages != drawn(6)[0].pages


def test_each_value_stands_literally_on_its_page(seeded: Seeded) -> None:
    document, _ = seeded
    assert document.facts
    for fact in document.facts:
        page = document.pages[fact.page - 1]
        for value in fact.items or ((fact.value,) if fact.kind == "fact" else ()):
            assert value in page
        if fact.kind == "yes_no":
            words = fact.form.replace("{e}", " ").replace("{n}", " ").lower().split()
            assert all(word in page.lower() for word in words if word not in ("the", "its"))


def test_answers_quote_the_value_and_cite_the_page(seeded: Seeded) -> None:
    document, turns = seeded
    answered = [turn for turn in turns if turn.kind != "unanswerable"]
    for turn in answered:
        assert turn.kind in KINDS
        assert turn.focus in turn.answer
        assert turn.answer.endswith(".") and f"[p. {turn.page}]" in turn.answer
        assert 1 <= turn.page <= len(document.pages)
        assert len(turn.question) > 2


def test_each_fact_of_a_document_is_stated_once(seeded: Seeded) -> None:
    document, _ = seeded
    pairs = [(fact.entity, fact.topic) for fact in document.facts]
    assert len(pairs) == len(set(pairs))
    assert not set(pairs) & set(document.missing)


def test_no_unanswerable_question_is_answerable(seeded: Seeded) -> None:
    document, turns = seeded
    stated = {(fact.entity.noun, question) for fact in document.facts for question in fact.topic.asked}
    labels = {fact.entity.noun for fact in document.facts if not fact.topic.name and fact.topic.value}
    for turn in turns:
        assert (turn.answer == UNKNOWN) == (turn.kind == "unanswerable")
        if turn.kind == "unanswerable" and turn.about is not None:
            entity, topic = turn.about
            assert not {(entity.noun, question) for question in topic.asked} & stated
            assert entity.noun not in labels
    assert all(is_answerable(document, (fact.entity, fact.topic)) for fact in document.facts)


def test_lines_are_wrapped_as_on_a_page(seeded: Seeded) -> None:
    document, _ = seeded
    assert all(page.strip() == page and page for page in document.pages)
    assert max(len(line) for page in document.pages for line in page.split("\n")) <= 200
    text = "".join(document.pages)
    assert GLUE not in text and "{" not in text and "}" not in text


@pytest.mark.parametrize("split", SPLITS)
def test_all_kinds_of_answers_appear(split: str) -> None:
    counts = Counter(turn.kind for seed in range(150) for turn in drawn(seed, split)[1])
    assert set(counts) == KINDS


def test_shares_of_the_kinds() -> None:
    settings = generate.Settings(chat_share=0, unknown_share=0.12, seed="shares")
    rows = generate.conversations(settings, 400)
    counts = Counter(message["kind"] for row in rows for message in row["messages"] if "kind" in message)
    total = sum(counts.values())
    assert 0.07 < counts["follow_up"] / total < 0.17
    assert 0.08 < counts["unanswerable"] / total < 0.17
    assert 0.01 < counts["comparison"] / total < 0.05
    assert 0.003 < counts["count"] / total < 0.05


def test_phrasing_asks_only_what_training_never_asks() -> None:
    kept_out = {text for domain in domains("phrasing") for topic in domain.topics for text in topic.asked}
    for seed in range(20):
        for turn in drawn(seed, "phrasing")[1]:
            if turn.about is not None:
                assert set(turn.about[1].asked) <= kept_out


def test_pronouns_stand_in_their_case() -> None:
    anna = Entity("Anna Miller", "Anna Miller", "she")
    pump = Entity("the pump", "pump")
    assert with_pronoun("Where does {e} live?", anna) == "Where does she live?"
    assert with_pronoun("Who employs {e}?", anna) == "Who employs her?"
    assert with_pronoun("What is {e}'s age?", anna) == "What is her age?"
    assert with_pronoun("What is the price of {e}?", pump) == "What is its price?"
    assert with_pronoun("What is the name of the owner of {e}?", pump) == "What is the name of its owner?"
    assert with_pronoun("How heavy is {e}?", pump) == "How heavy is it?"


def test_small_talk_fills_its_fields() -> None:
    for seed in range(50):
        assert 1 <= len(small_talk(Random(seed))) <= 3
        assert all("{" not in filled(Random(seed), form) for form in GENERAL_QUESTIONS)


def test_document_message_has_the_format_of_the_engine() -> None:
    expected = '<document title="a.pdf">\n[p. 1]\nOne\n\n[p. 2]\nTwo\n</document>'
    assert document_message("a.pdf", ["One", "Two"]) == expected
    assert document_message("a.pdf", ["One", "Two"], "Be short.") == expected + "\n\nBe short."


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--number", "40", "--min-chars", "200", "--max-chars", "900", "--turns", "5", "--chat-share", "0.2"]
    first, second, other = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "other"))
    generate.main(["--out", str(first), *options])
    generate.main(["--out", str(second), *options])
    generate.main(["--out", str(other), *options, "--split", "values"])
    assert "40 conversations" in capsys.readouterr().out
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    rows = read(first)
    assert len(rows) == 40
    for row in rows:
        messages = row["messages"]
        start = 1 if messages[0]["role"] == "system" else 0
        assert [message["role"] for message in messages[start:]] == ["user", "assistant"] * (len(messages[start:]) // 2)
        assert (start == 1) == bool(row["domain"])
        for message in messages[start + 1 :: 2]:
            assert message.get("focus", "") in message["content"]
            assert ("page" in message) == ("focus" in message)
    assert 11 in {len(row["messages"]) for row in rows}


def test_command_refuses_impossible_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--out", str(tmp_path / "x"), "--min-chars", "900", "--max-chars", "100"])
    assert "--min-chars must be from 1 to --max-chars, got 900 and 100" in capsys.readouterr().err
