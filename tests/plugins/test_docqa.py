"""The generator of document question answering: seeds, values on the cited pages, unanswerable questions, chat format."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from pitlane.plugins.training import docqa
from pitlane.plugins.training.docqa_templates import ATTRIBUTES, CHATS, KINDS, LABELS, UNKNOWN
from pitlane.plugins.training.docqa_values import VALUES

BUNDLED = Path(__file__).parents[2] / "storage" / "bundled"


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(params=range(40))
def seeded(request: pytest.FixtureRequest) -> tuple[docqa.Document, list[docqa.Turn]]:
    rng = Random(request.param)
    document = docqa.make_document(rng, rng.choice((150, 400, 1000, 2000)))
    return document, docqa.make_turns(rng, document, 12, unknown_rate=0.3)


def test_equal_seeds_give_equal_documents() -> None:
    made = []
    for _ in range(2):
        rng = Random(5)
        document = docqa.make_document(rng, 900)
        made.append((document, docqa.make_turns(rng, document, 8)))
    assert made[0] == made[1]
    assert docqa.make_document(Random(6), 900).pages != made[0][0].pages


def test_the_value_stands_on_the_cited_page_and_in_the_answer(seeded: tuple[docqa.Document, list[docqa.Turn]]) -> None:
    document, turns = seeded
    answered = [turn for turn in turns if turn.fact is not None]
    assert answered
    for turn in answered:
        assert turn.fact is not None
        assert turn.fact.value in turn.answer
        assert turn.answer.endswith(f" [p. {turn.fact.page}].")
        assert turn.fact.value in one_line(document.pages[turn.fact.page - 1])


def test_each_fact_of_a_document_is_stated_once(seeded: tuple[docqa.Document, list[docqa.Turn]]) -> None:
    document, _ = seeded
    pairs = [(fact.entity, fact.attribute) for fact in document.facts]
    assert len(pairs) == len(set(pairs))
    assert not set(pairs) & set(document.missing)


def test_unanswerable_questions_ask_for_what_no_clause_states(seeded: tuple[docqa.Document, list[docqa.Turn]]) -> None:
    document, turns = seeded
    text = one_line(" ".join(document.pages)).lower()
    for entity, attribute in document.missing:
        for clause in attribute.clauses:
            start = clause.split("{v}")[0].replace("{e}", entity.phrase).replace("{n}", entity.noun).strip().lower()
            assert not start or f"{start} " not in text or start == entity.phrase.lower() or start.endswith(" is")
    assert all(turn.answer == UNKNOWN for turn in turns if turn.fact is None)


def test_lines_are_wrapped_as_on_a_page(seeded: tuple[docqa.Document, list[docqa.Turn]]) -> None:
    document, _ = seeded
    assert all(page.strip() == page and page for page in document.pages)
    assert max(len(line) for page in document.pages for line in page.split("\n")) <= 140
    assert docqa.GLUE not in "".join(document.pages)


def test_values_are_drawn_from_open_sets() -> None:
    closed = {"weekday", "job", "subject", "colour", "material", "percent", "age", "count", "year", "duration", "hours"}
    for name, draw in VALUES.items():
        drawn = {draw(Random(seed)) for seed in range(300)}
        assert len(drawn) > (15 if name in closed else 150), name


def test_templates_are_complete() -> None:
    attributes = [*ATTRIBUTES.values(), *(attribute for _, attribute in LABELS)]
    for attribute in attributes:
        assert attribute.value in VALUES
        assert len(attribute.questions) >= 3, attribute.name
        assert all("{v}" in clause and ("{e}" in clause or "{n}" in clause) for clause in attribute.clauses)
        assert all("{e}" in question or "{n}" in question for question in attribute.questions)
    assert len(KINDS) >= 9
    assert all(name in ATTRIBUTES for kind in KINDS.values() for name in kind.attributes)
    assert len(CHATS) >= 5


def test_document_message_has_the_format_of_the_engine() -> None:
    expected = '<document title="a.pdf">\n[p. 1]\nOne\n\n[p. 2]\nTwo\n</document>'
    assert docqa.document_message("a.pdf", ["One", "Two"]) == expected
    assert docqa.document_message("a.pdf", ["One", "Two"], "Be short.") == expected + "\n\nBe short."


def test_training_rows_follow_the_chat_template_of_the_bundled_model() -> None:
    if not (BUNDLED / "tokenizer.json").exists():
        pytest.skip("no bundled model in this checkout")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from pitlane.plugins.training.bundled_data import ExampleMaker

    rng = Random(3)
    document = docqa.make_document(rng, 500)
    turns = docqa.make_turns(rng, document, 3)
    system = docqa.document_message(document.title, document.pages)
    example = ExampleMaker(tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json")), []).conversation(
        system, turns
    )
    messages = [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == example.ids
    start, end = example.answers[0]
    assert tokenizer.decode(example.ids[start : end - 1]) == turns[0].answer
    assert example.ids[end - 1] == tokenizer.eos_token_id
