"""Generator of document question answering: documents of several pages, facts in them, questions and answers.

A document is made of facts (entity, attribute, value) stated as sentences, list items, `Key: value` lines or table rows,
between filler sentences, wrapped into lines as a PDF's text comes out. An answer repeats the clause that holds the value
and ends with the page, as in `The workshop opens at 9:40 [p. 2].`; what the document does not hold is answered with
docqa_templates.UNKNOWN. Everything follows from one `random.Random`. Knows nothing of tokens or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from pitlane.plugins.training.docqa_templates import (
    ASKS,
    ATTRIBUTES,
    CHATS,
    FILLERS,
    KINDS,
    LABELS,
    LEADS,
    MODIFIERS,
    SUBTITLES,
    SYSTEMS,
    TAILS,
    UNKNOWN,
    Attribute,
    Kind,
)
from pitlane.plugins.training.docqa_values import VALUES, invented, person

GLUE = "\0"
KEY_FORMS = (
    "{n} {a}: {v}",
    "{n} {a}: {v}",
    "{a} of {e}: {v}",
    "{n}, {a}: {v}",
    "{a} ({n}): {v}",
    "{n}: {a} {v}",
)


class Entity(NamedTuple):
    """What facts are about: `phrase` with its article, `noun` without."""

    phrase: str
    noun: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One attribute of one entity, the clause that states it and the page (from 1) it stands on."""

    entity: Entity
    attribute: Attribute
    value: str
    clause: str
    page: int


class Turn(NamedTuple):
    """A question and its answer; `fact` is None for what the document does not say and for small talk."""

    question: str
    answer: str
    fact: Fact | None


@dataclass(slots=True)
class Document:
    """Pages of wrapped text and the facts in them; `missing` are pairs that it could hold but does not."""

    title: str
    pages: list[str]
    facts: list[Fact]
    missing: list[tuple[Entity, Attribute]]


@dataclass(slots=True)
class _Draft:
    """A document in the making: pairs not yet stated, and the blocks of the page being filled."""

    rng: Random
    kind: Kind
    pairs: list[tuple[Entity, Attribute]]
    page: int = 1
    facts: list[Fact] = field(default_factory=list)
    values: set[str] = field(default_factory=set)

    def state(self, pair: tuple[Entity, Attribute], sentence: bool) -> Fact:
        """Give the pair a new value and record it; only a sentence may use the less usual clauses."""
        entity, attribute = pair
        value = VALUES[attribute.value](self.rng)
        for _ in range(20):
            if value not in self.values:
                break
            value = VALUES[attribute.value](self.rng)
        self.values.add(value)
        form = self.rng.choice(attribute.clauses) if sentence else attribute.clauses[0]
        fact = Fact(entity, attribute, value, _fill(form, entity, value), self.page)
        self.facts.append(fact)
        return fact


def _fill(form: str, entity: Entity, value: str = "") -> str:
    text = form.replace("the {n}", entity.phrase) if entity.phrase == entity.noun else form
    return text.replace("{e}", entity.phrase).replace("{n}", entity.noun).replace("{v}", value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _glued(text: str, value: str, rng: Random) -> str:
    return text.replace(value, value.replace(" ", GLUE)) if rng.random() < 0.85 else text


def make_entity(rng: Random, kind: Kind) -> Entity:
    """Draw an entity of the kind: a person, a thing with a modifier, or a thing with a made-up name."""
    noun = rng.choice(kind.nouns)
    if noun == "#person":
        name = person(rng)
        return Entity(name, name)
    shape = rng.random()
    if shape < 0.25:
        return Entity(f"the {noun}", noun)
    word = invented(rng) if shape > 0.85 else rng.choice(MODIFIERS)
    return Entity(f"the {word} {noun}", f"{word} {noun}")


def _sentence(draft: _Draft) -> str:
    rng = draft.rng
    fact = draft.state(draft.pairs.pop(), sentence=True)
    text = _glued(fact.clause, fact.value, rng)
    if rng.random() < 0.15:
        text = f"{rng.choice(LEADS)} {text}"
    if rng.random() < 0.15:
        text += rng.choice(TAILS)
    return _capital(text) + "."


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line]).replace(GLUE, " ")


def _paragraph(draft: _Draft, width: int) -> str:
    rng = draft.rng
    parts = [_sentence(draft) for _ in range(min(rng.randint(1, 4), len(draft.pairs)))]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        parts.insert(rng.randint(0, len(parts)), rng.choice(FILLERS))
    return _wrapped(" ".join(parts), width)


def _list(draft: _Draft, width: int) -> str:
    mark = draft.rng.choice(("- ", "• ", "* ", "", "{}. "))
    items = [_sentence(draft) for _ in range(min(draft.rng.randint(2, 4), len(draft.pairs)))]
    return "\n".join(_wrapped(mark.format(number) + item, width) for number, item in enumerate(items, 1))


def _key_lines(draft: _Draft, width: int) -> str:
    """State pairs as `Price of the old tent: EUR 20`, or all of one entity under its name."""
    rng = draft.rng
    if rng.random() < 0.5:
        return _entity_block(draft)
    lines = []
    form = rng.choice(KEY_FORMS)
    for _ in range(min(rng.randint(2, 4), len(draft.pairs))):
        fact = draft.state(draft.pairs.pop(), sentence=False)
        shape = form.replace("{a}", fact.attribute.name) if fact.attribute.name else "{n}: {v}"
        lines.append(_capital(_fill(shape, fact.entity, fact.value)))
    return "\n".join(lines)


def _entity_block(draft: _Draft) -> str:
    entity, attribute = draft.pairs[-1]
    if not attribute.name:
        draft.pairs.pop()
        return f"{_capital(entity.noun)}: {draft.state((entity, attribute), sentence=False).value}"
    own = [pair for pair in draft.pairs if pair[0] == entity][:4]
    draft.pairs = [pair for pair in draft.pairs if pair not in own]
    facts = [draft.state(pair, sentence=False) for pair in own]
    return "\n".join([_capital(entity.noun), *(f"{_capital(fact.attribute.name)}: {fact.value}" for fact in facts)])


def _table(draft: _Draft, width: int) -> str:
    """State one to three attributes of several entities as rows of cells parted by blanks."""
    rng = draft.rng
    open_pairs = set(draft.pairs)
    entities = list(dict.fromkeys(pair[0] for pair in draft.pairs))
    columns = list(dict.fromkeys(pair[1] for pair in draft.pairs if pair[1].name))[: rng.choice((1, 2, 2, 3))]
    rows = [entity for entity in entities if all((entity, column) in open_pairs for column in columns)][:4]
    if len(rows) < 2 or not columns:
        return _key_lines(draft, width)
    lines = [
        " ".join([rng.choice(("Name", "Item", "What", "")), *(_capital(column.name) for column in columns)]).strip()
    ]
    for entity in rows:
        facts = [draft.state((entity, column), sentence=False) for column in columns]
        lines.append(" ".join([_capital(entity.noun), *(fact.value for fact in facts)]))
    draft.pairs = [pair for pair in draft.pairs if pair[0] not in rows or pair[1] not in columns]
    return "\n".join(lines)


def make_document(rng: Random, target_chars: int, unique: bool = False) -> Document:
    """Make a document of about `target_chars` characters on one to four pages.

    unique: every attribute is stated once, as in most short documents that people write; otherwise several entities share
    attributes, and only entity and attribute together find the value.
    """
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    width = rng.randint(60, 95)
    draw = _draw_unique_pairs if unique else _draw_pairs
    draft = _Draft(rng, kind, draw(rng, kind, target_chars))
    missing = [draft.pairs.pop() for _ in range(2)]
    place = f"{invented(rng)} {rng.choice(kind.nouns).title() if kind.nouns[0] != '#person' else ''}".strip()
    heading = f"{place} - {rng.choice(kind.titles)}" if rng.random() < 0.6 else rng.choice(kind.titles)
    num_pages = 1 if target_chars < 350 else rng.randint(1, 2) if target_chars < 800 else rng.randint(2, 4)
    pages = []
    for number in range(1, num_pages + 1):
        draft.page = number
        blocks = [heading] if number == 1 else []
        if number == 1 and rng.random() < 0.3:
            blocks.append(rng.choice(SUBTITLES))
        _fill_page(draft, blocks, target_chars // num_pages, width)
        if not blocks:
            break
        pages.append(rng.choice(("\n", "\n", "\n", "\n\n")).join(blocks))
    file_name = (
        f"{rng.choice((name, place, invented(rng), 'sample', 'document')).lower().replace(' ', rng.choice('-_'))}.pdf"
    )
    return Document(file_name, pages, draft.facts, missing + draft.pairs)


def _draw_pairs(rng: Random, kind: Kind, target_chars: int) -> list[tuple[Entity, Attribute]]:
    num_entities = max(2, min(12, target_chars // 220 + rng.randint(0, 2)))
    entities = list(dict.fromkeys(make_entity(rng, kind) for _ in range(num_entities)))
    attributes = [
        ATTRIBUTES[name] for name in rng.sample(kind.attributes, min(len(kind.attributes), rng.randint(4, 9)))
    ]
    pairs = [(entity, attribute) for entity in entities for attribute in attributes]
    if rng.random() < 0.6:
        pairs += _draw_labels(rng, max(2, len(pairs) // 3))
    rng.shuffle(pairs)
    return pairs


def _draw_unique_pairs(rng: Random, kind: Kind, target_chars: int) -> list[tuple[Entity, Attribute]]:
    """Draw an entity for each of many attributes; half of the facts are about things that are their own attribute."""
    number = 4 + target_chars // 90
    names = rng.sample(list(ATTRIBUTES), min(len(ATTRIBUTES), number))
    pairs = [(make_entity(rng, kind), ATTRIBUTES[name]) for name in names]
    pairs += _draw_labels(rng, number)
    rng.shuffle(pairs)
    return pairs


def _draw_labels(rng: Random, number: int) -> list[tuple[Entity, Attribute]]:
    """Draw things that are their own attribute, such as the door code."""
    pairs = {}
    for _ in range(number):
        nouns, attribute = rng.choice(LABELS)
        noun = rng.choice(nouns)
        noun = f"{rng.choice(MODIFIERS)} {noun}" if rng.random() < 0.35 else noun
        pairs[Entity(f"the {noun}", noun)] = attribute
    return list(pairs.items())


def _fill_page(draft: _Draft, blocks: list[str], target_chars: int, width: int) -> None:
    rng = draft.rng
    while draft.pairs and sum(map(len, blocks)) < target_chars:
        if rng.random() < 0.35:
            blocks.append(rng.choice(draft.kind.headings))
        make = rng.choice((_paragraph, _paragraph, _list, _key_lines, _key_lines, _table))
        blocks.append(make(draft, width))


def ask(rng: Random, entity: Entity, attribute: Attribute) -> str:
    """Phrase a question for the attribute of the entity."""
    question = _fill(rng.choice(attribute.questions), entity)
    style = rng.choice(ASKS)
    text = style.format(question[0].lower() + question[1:] if style[0] != "{" else _capital(question))
    return text.rstrip("?.").lower() if rng.random() < 0.06 else text


def make_turns(rng: Random, document: Document, num_turns: int, unknown_rate: float = 0.1) -> list[Turn]:
    """Ask for up to `num_turns` different facts, some of them facts the document does not hold."""
    turns = []
    for fact in rng.sample(document.facts, min(num_turns, len(document.facts))):
        if document.missing and rng.random() < unknown_rate:
            turns.append(Turn(ask(rng, *rng.choice(document.missing)), UNKNOWN, None))
        answer = f"{_capital(fact.clause)} [p. {fact.page}]."
        turns.append(Turn(ask(rng, fact.entity, fact.attribute), answer, fact))
    return turns


def make_small_talk(rng: Random) -> list[Turn]:
    """Make one to three turns of small talk about nothing."""
    chosen = rng.sample(CHATS, rng.randint(1, 3))
    return [Turn(rng.choice(questions.split("|")), answer, None) for questions, answer in chosen]


def document_message(title: str, pages: list[str], system: str = "") -> str:
    """Return the system message that carries a document: the format the engine uses, byte for byte."""
    body = "\n\n".join(f"[p. {number}]\n{page}" for number, page in enumerate(pages, 1))
    text = f'<document title="{title}">\n{body}\n</document>'
    return f"{text}\n\n{system}" if system else text


def make_system(rng: Random) -> str:
    """Return a user's system text, most often none."""
    return rng.choice(SYSTEMS) if rng.random() < 0.2 else ""
