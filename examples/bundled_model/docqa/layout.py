"""Blocks of a page: paragraphs, lists, key lines, blocks of one entity, tables, questions and answers, small dialogues.

A block function takes the next pairs of a Draft, states them and returns the text of the block, with line breaks like text that
is extracted from a PDF. It returns "" if the remaining pairs do not suit. A value is never broken between lines. Knows nothing of
questions of users.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bundled_model.docqa.domains import Attribute, Boolean, Label, ListFact
from bundled_model.docqa.facts import (
    GLUE,
    POSSESSIVES,
    Draft,
    Fact,
    Pair,
    capital,
    fill,
    glued,
    is_column,
    is_keyed,
    joined,
)
from bundled_model.docqa.names import first_name, person
from bundled_model.docqa.phrases import (
    COLON_LEADS,
    DISTRACTORS,
    FAQ_MARKS,
    FILLERS,
    FORMER,
    KEY_FORMS,
    LEADS,
    TAILS,
)
from bundled_model.docqa.values import VALUES

Layout = Callable[[Draft, int], str]
_OWNED = re.compile(r"^the ([a-z][a-z -]*?) (?:of|for) \{e\} ")


def wrapped(text: str, width: int) -> str:
    """Break a text into lines of up to `width` characters; glued spaces become plain spaces."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line]).replace(GLUE, " ")


def clause_text(fact: Fact) -> str:
    """Return the clause of a fact, with its value glued."""
    return fill(fact.form, fact.entity, value_text(fact))


def value_text(fact: Fact) -> str:
    """Return the value, glued so that a line can break only between the items of a list."""
    return joined(tuple(map(glued, fact.items))) if len(fact.items) > 1 else glued(fact.value)


def pronoun_text(fact: Fact) -> str:
    """Return the clause with a pronoun for its entity; unchanged if no pronoun fits."""
    form = fact.form
    if form.startswith("{e} "):
        form = fact.entity.pronoun + form[3:]
    elif match := _OWNED.match(form):
        form = f"{POSSESSIVES[fact.entity.pronoun]} {match[1]} {form[match.end() :]}"
    if "{e}" in form or "{n}" in form:
        return clause_text(fact)
    return form.replace("{v}", value_text(fact))


def filler(draft: Draft) -> str:
    """Return a sentence without a fact that a question asks for; some sentences hold values."""
    rng = draft.rng
    if rng.random() < 0.12:
        form = rng.choice(DISTRACTORS)
        return capital(re.sub(r"\{(\w+)\}", lambda field: glued(VALUES[field[1]](rng)), form))
    return rng.choice(draft.domain.fillers if rng.random() < 0.85 else FILLERS)


def _decorated(draft: Draft, text: str, fact: Fact) -> str:
    rng = draft.rng
    plain_end = fact.form.endswith("{v}")
    if rng.random() < 0.15:
        leads = (
            LEADS if fact.form.startswith(("{", "the ", "a ", "an ")) else COLON_LEADS
        )  # other clauses may be commands
        text = f"{rng.choice(leads)} {text}"
    if plain_end and isinstance(fact.topic, Attribute | Label) and rng.random() < 0.06:
        return text + rng.choice(FORMER).format(v=glued(draft.new_value(fact.topic)))
    return text + rng.choice(TAILS) if rng.random() < 0.14 else text


def sentence(draft: Draft) -> str:
    """State the next pair as a sentence; sometimes together with a second pair of the same entity."""
    rng = draft.rng
    pair = draft.pairs.pop()
    fact = draft.state(pair)
    text = clause_text(fact)
    if rng.random() < 0.15 and (more := draft.take(1, lambda other: other[0] == pair[0])):
        if is_keyed(more[0]) and rng.random() < 0.3:
            extra = draft.state(more[0], free=False)
            return f"{capital(text)} ({extra.topic.name}: {_cell(extra)})."
        second = pronoun_text(draft.state(more[0], subject=True))
        return f"{capital(text)}{rng.choice((', and ', ' and ', '; '))}{second}."
    return capital(_decorated(draft, text, fact)) + "."


def paragraph(draft: Draft, width: int) -> str:
    """Lay out sentences among fillers."""
    rng = draft.rng
    parts = []
    for _ in range(rng.randint(1, 4)):
        if draft.pairs:
            parts.append(sentence(draft))
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        parts.insert(rng.randint(0, len(parts)), filler(draft))
    return wrapped(" ".join(parts), width)


def bullets(draft: Draft, width: int) -> str:
    """Lay out sentences as items, with marks, numbers or numbers of sections."""
    rng = draft.rng
    draft.section += 1
    mark = rng.choice(("- ", "• ", "* ", "", "{}. ", "{}) ", f"{draft.section}.{{}} ", f"§ {draft.section}.{{}} "))
    items: list[str] = []
    while draft.pairs and len(items) < 4 and (len(items) < 2 or rng.random() < 0.6):
        items.append(sentence(draft))
    return "\n".join(wrapped(mark.format(number) + item, width) for number, item in enumerate(items, 1))


def key_lines(draft: Draft, width: int) -> str:
    """State pairs as `Price of the old tent: EUR 20`."""
    form = draft.rng.choice(KEY_FORMS)
    lines = []
    for pair in draft.take(draft.rng.randint(2, 4), is_keyed):
        fact = draft.state(pair, free=False)
        shape = form.replace("{a}", fact.topic.name) if fact.topic.name else "{n}: {v}"
        lines.append(wrapped(capital(fill(shape, fact.entity, _cell(fact))), width))
    return "\n".join(lines)


def _cell(fact: Fact) -> str:
    return ", ".join(map(glued, fact.items)) if fact.items else glued(fact.value)


def entity_block(draft: Draft, width: int) -> str:
    """State several pairs of an entity under its name: as key lines, in a single line, or as sentences with a pronoun."""
    rng = draft.rng
    first = draft.take(1, lambda pair: bool(pair[1].name))
    if not first:
        return ""
    entity = first[0][0]
    shape = rng.choice(("keys", "keys", "line", "pronouns", "pronouns"))
    keyed = shape != "pronouns"
    pairs = first + draft.take(rng.randint(1, 4), lambda pair: pair[0] == entity and (is_keyed(pair) or not keyed))
    name = capital(entity.noun if rng.random() < 0.8 else entity.phrase)
    if not keyed:
        return _pronoun_block(draft, name, pairs, width)
    facts = [draft.state(pair, free=False) for pair in pairs]
    if shape == "line":
        cells = [f"{fact.topic.name} {_cell(fact)}" for fact in facts]
        return wrapped(f"{name}: {rng.choice((', ', '; ', ' | ')).join(cells)}", width)
    mark = rng.choice((": ", ": ", " - ", " = ", " "))
    return "\n".join([name, *(wrapped(f"{capital(fact.topic.name)}{mark}{_cell(fact)}", width) for fact in facts)])


def _pronoun_block(draft: Draft, name: str, pairs: list[Pair], width: int) -> str:
    parts = []
    for index, pair in enumerate(pairs):
        fact = draft.state(pair, subject=True)
        parts.append(capital(pronoun_text(fact) if index or draft.rng.random() < 0.7 else clause_text(fact)) + ".")
        if draft.rng.random() < 0.15:
            parts.append(filler(draft))
    return f"{name}\n{wrapped(' '.join(parts), width)}"


def table(draft: Draft, width: int) -> str:
    """State one to three attributes of several entities as a table."""
    rng = draft.rng
    open_pairs = {pair for pair in draft.pairs if is_column(pair)}
    entities = list(dict.fromkeys(pair[0] for pair in draft.pairs))
    columns = list(dict.fromkeys(pair[1] for pair in draft.pairs if is_column(pair)))[: rng.choice((1, 2, 2, 3))]
    rows = [entity for entity in entities if all((entity, column) in open_pairs for column in columns)]
    rows = rows[: rng.randint(2, 6)]
    if len(rows) < 2 or not columns:
        return ""
    corner = rng.choice(("Name", "Item", "What", ""))
    cells = [[corner, *(capital(column.name) for column in columns)]]
    for entity in rows:
        facts = [draft.state((entity, column), free=False) for column in columns]
        cells.append([capital(entity.noun), *(fact.value for fact in facts)])
    draft.pairs = [pair for pair in draft.pairs if pair[0] not in rows or pair[1] not in columns]
    gap, shape = rng.choice((" ", " ", " ", "  ", " | ", ", ", "\t")), rng.random()
    if shape < 0.1:
        cells = [list(column) for column in zip(*cells, strict=True)]
    elif shape < 0.25:
        cells = [row[::-1] for row in cells]
    return "\n".join(gap.join(row).strip() for row in cells)


def enumeration(draft: Draft, width: int) -> str:
    """State a fact of several values as a heading and a line for every value."""
    rng = draft.rng
    taken = draft.take(1, lambda pair: isinstance(pair[1], ListFact))
    if not taken:
        return ""
    fact = draft.state(taken[0], free=False)
    form = rng.choice(("{a} of {e}:", "{a} ({n}):", "{n}, {a}:", "{n}: {a}"))
    mark = rng.choice(("- ", "• ", "* ", "{}. ", ""))
    head = capital(fill(form.replace("{a}", fact.topic.name), fact.entity))
    return "\n".join([head, *(mark.format(number) + item for number, item in enumerate(fact.items, 1))])


def questions_and_answers(draft: Draft, width: int) -> str:
    """State pairs as answers to questions. An answer is a sentence or only the value."""
    rng = draft.rng
    marks = rng.choice(FAQ_MARKS)
    if rng.random() < 0.4:
        marks = (f"{first_name(rng)}: ", f"{first_name(rng)}: ")
    short = rng.random() < 0.4
    lines = []
    for pair in draft.take(rng.randint(1, 3)):
        fact = draft.state(pair, free=not short)
        question = capital(fill(pair[1].heading, pair[0]))
        answer = clause_text(fact)
        if isinstance(pair[1], Boolean):
            answer = f"{fact.value}, {answer}"
        elif short:
            answer = clause_text(fact) if len(fact.items) > 1 else glued(fact.value)
        lines += [wrapped(marks[0] + question, width), wrapped(marks[1] + _ended(answer, short), width)]
    return "\n".join(lines)


def _ended(text: str, short: bool) -> str:
    """End a sentence with a full stop. A short answer keeps its first letter: a value must not change."""
    return f"{text}." if short else f"{capital(text)}."


def dialogue(draft: Draft, width: int) -> str:
    """Lay out sentences as the speech of two people, as in minutes and interviews."""
    rng = draft.rng
    speakers = [(person if rng.random() < 0.5 else first_name)(rng) for _ in range(2)]
    mark = rng.choice(("{}: {}", "{}: {}", "{} - {}", '{}: "{}"'))
    lines = []
    for number in range(rng.randint(2, 4)):
        if draft.pairs:
            speech = sentence(draft) if number == 0 or rng.random() < 0.75 else filler(draft)
            lines.append(wrapped(mark.format(speakers[number % 2], speech), width))
    return "\n".join(lines)


LAYOUTS: tuple[tuple[Layout, int], ...] = (
    (paragraph, 30),
    (bullets, 14),
    (key_lines, 12),
    (entity_block, 20),
    (table, 12),
    (enumeration, 4),
    (questions_and_answers, 5),
    (dialogue, 4),
)
