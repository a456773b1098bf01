"""Measures of a text: values, citations, refusals, SQuAD's exact match and F1, distinct-n, repetition loops.

An answer cites pages as `[p. 2]`. An answer contains a value only if the value stands alone: "120", "20.5" and "[p. 20]" do not
contain "20". Knows no model: texts and token ids in, numbers out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

REFUSAL = "The document does not say that."

Row = dict[str, float]
Rows = dict[str, Row]

_CITATION = re.compile(r"\[p\. (\d+)\]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def one_line(text: str) -> str:
    """Return the text with single spaces and straight apostrophes."""
    return " ".join(text.replace("’", "'").split())


def cited_pages(answer: str) -> set[int]:
    """Return the pages that the answer cites."""
    return {int(number) for number in _CITATION.findall(answer)}


def without_citations(answer: str) -> str:
    """Return the answer without page citations and final full stop."""
    return re.sub(r"\s+([.,;!?])", r"\1", one_line(_CITATION.sub(" ", answer))).removesuffix(".")


def is_refusal(answer: str) -> bool:
    """Whether the answer is the agreed refusal and nothing else."""
    return one_line(answer) == REFUSAL


def contains(value: str, answer: str) -> bool:
    """Whether the value stands alone in the answer; case and citations do not matter."""
    pattern = rf"(?<!\w)(?<!\d[.,:]){re.escape(one_line(value))}(?!\w)(?![.,:]\d)"
    return re.search(pattern, without_citations(answer), re.IGNORECASE) is not None


def has_value(values: Iterable[str], answer: str) -> bool:
    """Whether the answer contains a value of `values`; "yes" and "no" must be its first word."""
    for value in values:
        if value.lower() in ("yes", "no"):
            first = re.match(r"\w+", answer.strip())
            if first is not None and first[0].lower() == value.lower():
                return True
        elif contains(value, answer):
            return True
    return False


class Mark(NamedTuple):
    """The judgement of an answer. None: the measure does not apply to the question."""

    exact: bool | None = None
    value: bool | None = None
    page: bool | None = None
    refused: bool | None = None


def shares(marks: Sequence[Mark]) -> Row:
    """Return the number of answers and, for each field of Mark that applies, the share of True."""
    row: Row = {"questions": len(marks)}
    for field in Mark._fields:
        judged = [getattr(mark, field) for mark in marks if getattr(mark, field) is not None]
        if judged:
            row[field] = sum(judged) / len(judged)
    return row


def normalised(text: str) -> str:
    """Normalise like the SQuAD script: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words (SQuAD)."""
    answer_words, gold_words = normalised(answer).split(), normalised(gold).split()
    if not answer_words or not gold_words:
        return float(answer_words == gold_words)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words))


def distinct(outputs: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of the outputs (distinct-n, Li et al. 2016)."""
    grams = [tuple(output[start : start + n]) for output in outputs for start in range(len(output) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def has_loop(token_ids: Sequence[int], copies: int = 3, covered: int = 24) -> bool:
    """Whether a run of tokens repeats at least `copies` times in a row, over at least `covered` tokens."""
    for period in range(1, len(token_ids) // copies + 1):
        run = 0
        for position in range(period, len(token_ids)):
            run = run + 1 if token_ids[position] == token_ids[position - period] else 0
            if run >= (copies - 1) * period and run + period >= covered:
                return True
    return False
