"""Measures of the evaluation: values, citations, refusals, SQuAD's scores, distinct-n, loops."""

from __future__ import annotations

import pytest

from bundled_model.evaluation import measures, squad
from bundled_model.evaluation.measures import REFUSAL, Mark


@pytest.mark.parametrize(
    ("value", "answer", "expected"),
    [
        ("9:40", "The workshop opens at 9:40 [p. 2].", True),
        ("9:40", "It opens at 19:40 [p. 2].", False),
        ("20", "It costs 20.50 [p. 1].", False),
        ("20", "It costs 20.", True),
        ("20", "It costs 120 [p. 20].", False),
        ("2", "It says so [p. 2].", False),
        ("£20", "The deposit is £20.50.", False),
        ("£20", "The deposit is £20, not more.", True),
        ("15%", "They get 15% off [p. 1].", True),
        ("Arthritis", "She had arthritis.", True),
        ("Mrs Lavender's scones", "Mrs Lavender’s\nscones.", True),
        ("a.b", "axb", False),
        ("412 g", "It weighs 412 grams.", False),
        ("oak", "A soak.", False),
    ],
)
def test_a_value_must_stand_by_itself(value: str, answer: str, expected: bool) -> None:
    assert measures.contains(value, answer) is expected


def test_any_accepted_spelling_counts_and_yes_or_no_must_come_first() -> None:
    assert measures.has_value(["six weeks", "6 weeks"], "It lasts 6 weeks [p. 2].")
    assert not measures.has_value(["six weeks", "6 weeks"], "It lasts 16 weeks [p. 2].")
    assert measures.has_value(["yes"], " Yes, the parking is free [p. 2].")
    assert not measures.has_value(["no"], "Yes, no cheques are taken.")
    assert not measures.has_value(["no"], "Not on the stairs.")
    assert not measures.has_value(["no"], "")


def test_citations_and_refusals() -> None:
    answer = "The boat [p. 1] cost £11,400 [p. 12]."
    assert measures.cited_pages(answer) == {1, 12}
    assert measures.without_citations(answer) == "The boat cost £11,400"
    assert measures.is_refusal(f" {REFUSAL}\n") and not measures.is_refusal(f"{REFUSAL} Perhaps 3.")


def test_shares_leave_out_what_is_not_judged() -> None:
    marks = [Mark(exact=True, value=True), Mark(exact=False, value=True), Mark(exact=False, refused=True), Mark()]
    assert measures.shares(marks) == {"questions": 4, "exact": 1 / 3, "value": 1.0, "refused": 1.0}


def test_squad_scores() -> None:
    assert measures.normalised("The  U.S.-led, (an) Army!") == "usled army"
    assert measures.f1("in October 1973", "October 1973") == pytest.approx(0.8)
    assert measures.f1("the", "a") == 1 and measures.f1("dog", "cat") == 0
    golds = [("October 1973", "1973"), ("$12",), ("nine",)]
    answers = ["It began in October 1973 [p. 1].", "nearly $12 [p. 1].", "Nineteen [p. 9]."]
    scores = squad.score(answers, golds)
    assert scores == pytest.approx({"exact": 0, "f1": (4 / 7 + 2 / 3) / 3, "contains": 2 / 3})
    assert squad.score(["The October 1973 [p. 1]."], [golds[0]]) == {"exact": 1, "f1": 1, "contains": 1}


def test_distinct_n() -> None:
    assert measures.distinct([[1, 1, 1, 1]], 1) == 0.25
    assert measures.distinct([[1, 2, 3], [1, 2, 4]], 2) == 0.75
    assert measures.distinct([[1]], 2) == 1.0


def test_loops() -> None:
    block = list(range(9))
    assert not measures.has_loop([*range(200)])
    assert measures.has_loop([7, 8, *block * 3, 99])
    assert not measures.has_loop([7, 8, *block * 2, 99])
    assert not measures.has_loop([1, 2] * 11 + [*range(50)]) and measures.has_loop([1, 2] * 12 + [*range(50)])
    assert measures.has_loop([5] * 24) and not measures.has_loop([5] * 23)
