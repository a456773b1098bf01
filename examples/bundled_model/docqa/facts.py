"""Entities and their facts: the material of a document before its layout.

A fact gives a new value to a pair: an entity and a topic of a domain (domains.py). A Draft holds the pairs that are not yet
stated, and records the facts with their pages. Knows nothing of layout or questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from bundled_model.docqa.comparisons import measured
from bundled_model.docqa.domains import Attribute, Boolean, Domain, Label, ListFact, Topic
from bundled_model.docqa.names import invented, letters, person
from bundled_model.docqa.phrases import MODIFIERS
from bundled_model.docqa.values import VALUES
from bundled_model.docqa.words import FEMALE_NAMES, MALE_NAMES

POSSESSIVES = {"it": "its", "he": "his", "she": "her"}
GLUE = "\0"  # stands for a space at which no line may break
LOWER_STARTERS = frozenset(word.lower() for word in MODIFIERS)


class Entity(NamedTuple):
    """The thing or person of a fact: `phrase` with article, `noun` without; `pronoun` is it, he or she."""

    phrase: str
    noun: str
    pronoun: str = "it"


Pair = tuple[Entity, Topic]


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of a topic of an entity. items: the values of a list; form: the clause that states it; page: from 1."""

    entity: Entity
    topic: Topic
    value: str
    items: tuple[str, ...]
    form: str
    page: int

    @property
    def clause(self) -> str:
        return fill(self.form, self.entity, self.value)

    @property
    def kind(self) -> str:
        """Return the kind of answer: fact, list or yes_no."""
        return "yes_no" if isinstance(self.topic, Boolean) else "list" if isinstance(self.topic, ListFact) else "fact"


def fill(form: str, entity: Entity, value: str = "") -> str:
    """Fill in a clause or a question. People and numbered things get no article."""
    text = form.replace("the {n}", entity.phrase) if entity.phrase == entity.noun else form
    return text.replace("{e}", entity.phrase).replace("{n}", entity.noun).replace("{v}", value)


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def glued(text: str) -> str:
    """Return the text with spaces at which no line may break."""
    return text.replace(" ", GLUE)


def joined(items: tuple[str, ...]) -> str:
    """Return `A, B and C`."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def make_person(rng: Random) -> Entity:
    """Draw a person. A known first name decides the pronoun."""
    name = person(rng)
    words = set(name.split())
    she = not words.isdisjoint(FEMALE_NAMES) or (words.isdisjoint(MALE_NAMES) and rng.random() < 0.5)
    if words & {"Mr", "Ms"}:
        she = "Ms" in words
    return Entity(name, name, "she" if she else "he")


def make_entity(rng: Random, noun: str) -> Entity:
    """Draw an entity of a noun: a person, or a thing without addition, with a modifier, an invented name or a number."""
    if noun == "#person":
        return make_person(rng)
    shape = rng.random()
    bare = noun.split()[0].lower() in LOWER_STARTERS or len(noun.split()) > 2
    if shape < (0.6 if bare else 0.25):
        return Entity(f"the {noun}", noun)
    if shape < 0.33 or bare:
        mark = rng.choice((str(rng.randint(1, 40)), letters(rng, 1, 1), f"{letters(rng, 1, 1)}{rng.randint(1, 99)}"))
        return Entity(f"{noun} {mark}", f"{noun} {mark}")
    word = invented(rng) if shape > 0.82 else rng.choice(MODIFIERS)
    return Entity(f"the {word} {noun}", f"{word} {noun}")


def make_entities(rng: Random, domain: Domain, number: int) -> list[Entity]:
    """Draw about `number` entities. Often several share a noun, so that only the other words tell them apart."""
    nouns = domain.nouns
    if rng.random() < 0.35:
        nouns = tuple(rng.sample(nouns, min(len(nouns), 1 + number // 3)))
    return list(dict.fromkeys(make_entity(rng, rng.choice(nouns)) for _ in range(number)))


def make_label(rng: Random, label: Label) -> Entity:
    """Draw a thing of a label."""
    noun = rng.choice(label.nouns)
    simple = " of " not in noun and noun.split()[0] not in LOWER_STARTERS
    noun = f"{rng.choice(MODIFIERS)} {noun}" if simple and rng.random() < 0.25 else noun
    return Entity(f"the {noun}", noun)


@dataclass(slots=True)
class Draft:
    """A document that is being written: pairs not yet stated (the last is the next), stated facts, used values."""

    rng: Random
    domain: Domain
    pairs: list[Pair]
    page: int = 1
    section: int = 0
    headings: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    values: set[str] = field(default_factory=set)
    units: dict[Topic, str] = field(default_factory=dict)

    def take(self, number: int, suits: Callable[[Pair], bool] = lambda pair: True) -> list[Pair]:
        """Remove and return up to `number` of the next pairs for which `suits` holds."""
        taken: list[Pair] = []
        for index in range(len(self.pairs) - 1, -1, -1):
            if len(taken) == number:
                break
            if suits(self.pairs[index]):
                taken.append(self.pairs.pop(index))
        return taken

    def new_value(self, topic: Topic) -> str:
        """Draw a value that is not yet in the document, in most cases in the unit of the topic's earlier values."""
        rng, draw = self.rng, VALUES[topic.value]
        unit = self.units.get(topic) if rng.random() < 0.8 else None
        value = draw(rng)
        for _ in range(12):
            measure = measured(topic.value, value)
            if value not in self.values and (unit is None or measure is None or measure.unit == unit):
                break
            value = draw(rng)
        measure = measured(topic.value, value)
        if measure is not None:
            self.units.setdefault(topic, measure.unit)
        self.values.add(value)
        return value

    def state(self, pair: Pair, free: bool = True, subject: bool = False) -> Fact:
        """Give the pair a new value and record the fact.

        free: any clause may be used; otherwise the clause `topic.answer`, as in tables. subject: prefer clauses that start with
        the entity, because a pronoun can replace it.
        """
        entity, topic = pair
        items: tuple[str, ...] = ()
        forms = topic.stated if free else (topic.answer, *topic.stated)
        if isinstance(topic, Boolean):
            forms = topic.stated if self.rng.random() < 0.5 else topic.denied
            value = "Yes" if forms is topic.stated else "No"
        elif isinstance(topic, ListFact):
            items = tuple(dict.fromkeys(self.new_value(topic) for _ in range(self.rng.choice((2, 2, 3, 3, 4, 5)))))
            value = joined(items) if len(items) > 1 else items[0]
        else:
            value = self.new_value(topic)
        if value[0].islower():  # at the start of a sentence, its first letter would become a capital
            forms = tuple(form for form in forms if not form.startswith("{v}")) or forms
        if subject:
            forms = tuple(form for form in forms if form.startswith("{e} ")) or forms
        form = self.rng.choice(forms) if free or subject else forms[0]
        if form.startswith("{v}"):
            value, items = capital(value), (capital(items[0]), *items[1:]) if items else ()
        fact = Fact(entity, topic, value, items, form, self.page)
        self.facts.append(fact)
        return fact


def is_keyed(pair: Pair) -> bool:
    """Whether the pair can stand as `Key: value`."""
    return not isinstance(pair[1], Boolean)


def is_column(pair: Pair) -> bool:
    """Whether the pair can stand in a column of a table."""
    return isinstance(pair[1], Attribute)
