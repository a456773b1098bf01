"""The domain files of the document question generator: schema, splits, clear errors, open sets of values."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from bundled_model.docqa.comparisons import DEGREES, NUMERIC, measured
from bundled_model.docqa.domains import (
    HELD_OUT_DOMAINS,
    SPLITS,
    DomainError,
    all_domains,
    domain_files,
    domains,
    read_domain,
)
from bundled_model.docqa.values import VALUES

CLOSED = frozenset("weekday grade language country".split())
DOMAIN = """
titles = ["Rules"]
headings = ["Noise"]
nouns = ["kitchen"]
fillers = ["Be kind."]
""" + "".join(
    f"""
[[attributes]]
name = "price {number}"
value = "money"
clauses = ["{{e}} costs {{v}}", "the price of {{e}} is {{v}}"]
questions = ["What is {{e}}?", "How much is {{e}}?", "Price of {{e}}?", "{{n}} price?"]
"""
    for number in range(3)
)


@pytest.mark.parametrize("file", domain_files(), ids=lambda file: file.name)
def test_each_domain_file_follows_the_schema(file: Path) -> None:
    domain = read_domain(file)
    assert len(domain.attributes) >= 3
    assert len(domain.titles) >= 3 and len(domain.headings) >= 3 and len(domain.fillers) >= 5
    assert all(text.endswith((".", "!", "?")) for text in domain.fillers)


def test_there_are_many_domains_and_the_held_out_ones_are_among_them() -> None:
    names = {domain.name for domain in all_domains()}
    assert len(names) >= 20
    assert set(HELD_OUT_DOMAINS) < names


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('value = "money"', 'value = "gold"', "unknown kind of value 'gold'; known are person"),
        ('"{e} costs {v}", ', "", "`clauses` needs at least 2 texts, got 1"),
        ('"{n} price?"', '"Price?"', "a question must name its entity"),
        ("{e} costs {v}", "{e} is dear", "a clause must hold the value"),
        ("{e} costs {v}", "{e} costs {v}.", "a clause must not end in a stop"),
        ("{e} costs {v}", "{x} costs {v}", "only {e}{n}{v} can be filled in"),
        ('name = "price 0"', "name = 3", "`name` must be of one to four words, got 3"),
        ('titles = ["Rules"]', 'title = "Rules"', "unknown key `title`"),
        ('nouns = ["kitchen"]', 'nouns = "kitchen"', "`nouns` must be a list of texts, got 'kitchen'"),
        ('nouns = ["kitchen"]', 'nouns = ["kitchen"', "Unclosed array"),
    ],
)
def test_errors_of_a_domain_file_name_file_and_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "house.toml"
    file.write_text(DOMAIN)
    assert read_domain(file).name == "house"
    file.write_text(DOMAIN.replace(old, new, 1))
    with pytest.raises(DomainError) as caught:
        read_domain(file)
    assert str(caught.value).startswith("house.toml")
    assert message in str(caught.value)


def test_training_and_evaluation_share_no_question_of_a_topic() -> None:
    training = {text.lower() for domain in domains("train") for topic in domain.topics for text in topic.asked}
    kept_out = {text.lower() for domain in domains("phrasing") for topic in domain.topics for text in topic.asked}
    assert len(kept_out) > 200
    assert not training & kept_out


def test_clauses_are_kept_out_where_there_are_three() -> None:
    for whole, train, phrasing in zip(_kept(all_domains()), domains("train"), domains("phrasing"), strict=True):
        for full, seen, new in zip(whole.topics, train.topics, phrasing.topics, strict=True):
            if len(full.stated) < 3:
                assert seen.stated == new.stated == full.stated
            else:
                assert (*seen.stated, *new.stated) == full.stated


def _kept(pool):  # type: ignore[no-untyped-def]
    return [domain for domain in pool if domain.name not in HELD_OUT_DOMAINS]


def test_held_out_domains_are_in_no_other_split() -> None:
    assert {domain.name for domain in domains("domain")} == set(HELD_OUT_DOMAINS)
    for split in set(SPLITS) - {"domain"}:
        assert not {domain.name for domain in domains(split)} & set(HELD_OUT_DOMAINS)
    assert [domain.name for domain in domains("values")] == [domain.name for domain in domains("train")]
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train"):
        domains("test")


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_drawn_from_open_sets(kind: str) -> None:
    drawn = {VALUES[kind](Random(seed)) for seed in range(400)}
    assert len(drawn) > (20 if kind in CLOSED else 60)
    assert all(value == value.strip() and "\n" not in value and "{" not in value for value in drawn)


@pytest.mark.parametrize("kind", sorted(NUMERIC))
def test_numeric_values_are_read_back(kind: str) -> None:
    assert kind in DEGREES
    assert all(measured(kind, VALUES[kind](Random(seed))) is not None for seed in range(200))


def test_only_equal_units_compare() -> None:
    assert measured("clock", "1:30 pm") == measured("clock", "13:30")
    assert measured("clock", "12:05 am") == (5, "clock")
    assert measured("weight", "4.5 kg") == (4.5, "# kg")
    assert measured("money", "$1,200.50") == (1200.5, "$#")
    assert measured("date", "2 May") < measured("date", "May 3")  # type: ignore[operator]
    assert measured("date", "2 May 2001").unit != measured("date", "2 May").unit  # type: ignore[union-attr]
    assert measured("person", "Anna 3") is None
