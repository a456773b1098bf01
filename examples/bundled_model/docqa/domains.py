"""The domains of generated documents, read from domains/*.toml, and their splits.

A domain holds titles, headings, nouns of entities and four kinds of topic: attributes, labels (things with a value of their own,
such as the door code), booleans and lists. In clauses and questions, `{e}` is the entity with its article, `{n}` the entity
without it, `{v}` the value. Three things are held out of training: HELD_OUT_DOMAINS, the last uncommon question of every topic,
and the last clause of a topic with three clauses or more.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bundled_model.docqa.values import VALUES

HELD_OUT_DOMAINS = ("a_restaurant_menu", "b_rental_contract", "c_medical_leaflet")
COMMON_USES = 12  # a question of more topics than this is common: training cannot do without it
SPLITS = ("train", "values", "phrasing", "domain")
LABEL_CLAUSES = {
    "person": ("{e} is {v}", "{v} is {e}"),
    "money": ("{e} is {v}", "{e} amounts to {v}"),
    "percent": ("{e} is {v}", "{e} stands at {v}"),
    "count": ("{e} is {v}", "{e} stands at {v}"),
    "company": ("{e} is {v}", "{v} is {e}"),
}


class DomainError(ValueError):
    """A domain file does not follow the schema. The message names the file and the place."""


@dataclass(frozen=True, slots=True, eq=False)
class Topic:
    """Something that a document can state.

    asked: the questions of this split. stated: the clauses that a document may use. answer: the clause of a fact in a table or a
    key line. heading: the question of a fact in a list of questions and answers.
    """

    name: str
    value: str
    stated: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str
    heading: str


@dataclass(frozen=True, slots=True, eq=False)
class Attribute(Topic):
    """A property of an entity."""


@dataclass(frozen=True, slots=True, eq=False)
class Label(Topic):
    """Things with a value of their own, such as the door code."""

    nouns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Boolean(Topic):
    """A fact that is true or not. `denied` holds the clauses for not true, in the order of `stated`."""

    denied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ListFact(Topic):
    """A fact with several values."""


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A kind of document."""

    name: str
    titles: tuple[str, ...]
    headings: tuple[str, ...]
    nouns: tuple[str, ...]
    fillers: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    labels: tuple[Label, ...]
    booleans: tuple[Boolean, ...]
    lists: tuple[ListFact, ...]

    @property
    def people(self) -> bool:
        return self.nouns[0] == "#person"

    @property
    def entity_topics(self) -> tuple[Topic, ...]:
        """Return the topics of the domain's entities: all but the labels."""
        return (*self.attributes, *self.booleans, *self.lists)

    @property
    def topics(self) -> tuple[Topic, ...]:
        return (*self.entity_topics, *self.labels)


class _Reader:
    """Reads a domain file; an error names the place in the file."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name, self.data = name, data

    def fail(self, place: str, problem: str) -> DomainError:
        return DomainError(f"{self.name}.toml, {place}: {problem}")

    def texts(self, table: dict[str, Any], key: str, place: str, least: int) -> tuple[str, ...]:
        texts = table.get(key)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise self.fail(place, f"`{key}` must be a list of texts, got {texts!r}")
        if len(texts) < least:
            raise self.fail(place, f"`{key}` needs at least {least} texts, got {len(texts)}")
        if len(set(texts)) < len(texts):
            raise self.fail(place, f"`{key}` holds a text twice")
        return tuple(texts)

    def kind(self, table: dict[str, Any], place: str) -> str:
        kind = table.get("value")
        if not isinstance(kind, str) or kind not in VALUES:
            raise self.fail(place, f"unknown kind of value {kind!r}; known are {', '.join(VALUES)}")
        return kind

    def clauses(self, table: dict[str, Any], key: str, place: str, fields: str, least: int = 1) -> tuple[str, ...]:
        clauses = self.texts(table, key, place, least)
        for text in clauses:
            self.check_fields(text, place, fields)
            if text.endswith((".", "?", "!")):
                raise self.fail(place, f"a clause must not end in a stop: {text!r}")
            if "{v}" in fields and "{v}" not in text:
                raise self.fail(place, f"a clause must hold the value {{v}}: {text!r}")
            if "{e}" not in text and "{n}" not in text:
                raise self.fail(place, f"a clause must name its entity, {{e}} or {{n}}: {text!r}")
        return clauses

    def questions(self, table: dict[str, Any], place: str, least: int) -> tuple[str, ...]:
        questions = self.texts(table, "questions", place, least)
        for text in questions:
            self.check_fields(text, place, "{e}{n}")
            if "{e}" not in text and "{n}" not in text:
                raise self.fail(place, f"a question must name its entity, {{e}} or {{n}}: {text!r}")
        return questions

    def check_fields(self, text: str, place: str, fields: str) -> None:
        rest = text
        for field in ("{e}", "{n}", "{v}"):
            if field in fields:
                rest = rest.replace(field, "")
        if "{" in rest or "}" in rest:
            raise self.fail(place, f"only {fields} can be filled in: {text!r}")

    def tables(self, key: str) -> Iterable[tuple[str, dict[str, Any]]]:
        for number, table in enumerate(self.data.get(key, []), 1):
            yield f"{key} {number} ({table.get('name', '')})", table

    def attribute(self, place: str, table: dict[str, Any], cls: type[Attribute] | type[ListFact]) -> Any:
        name = table.get("name")
        if not isinstance(name, str) or not 1 <= len(name.split()) <= 4:
            raise self.fail(place, f"`name` must be of one to four words, got {name!r}")
        clauses = self.clauses(table, "clauses", place, "{e}{n}{v}", 2 if cls is Attribute else 1)
        questions = self.questions(table, place, 4 if cls is Attribute else 2)
        return cls(name, self.kind(table, place), clauses, questions, clauses[0], questions[0])

    def label(self, place: str, table: dict[str, Any]) -> Label:
        nouns, questions, value = (
            self.texts(table, "nouns", place, 1),
            self.questions(table, place, 2),
            self.kind(table, place),
        )
        clauses = LABEL_CLAUSES.get(value, ("{e} is {v}",))
        if shared := set(nouns) & set(self.data["nouns"]):
            raise self.fail(place, f"a label must not be an entity noun as well: {', '.join(sorted(shared))}")
        return Label("", value, clauses, questions, clauses[0], questions[0], nouns)

    def boolean(self, place: str, table: dict[str, Any]) -> Boolean:
        yes, no = (self.clauses(table, key, place, "{e}{n}") for key in ("yes", "no"))
        if len(yes) != len(no):
            raise self.fail(place, f"`yes` and `no` must be equally many, got {len(yes)} and {len(no)}")
        questions = self.questions(table, place, 2)
        return Boolean("", "", yes, questions, yes[0], questions[0], no)

    def domain(self) -> Domain:
        for key in self.data:
            if key not in {"titles", "headings", "nouns", "fillers", "attributes", "labels", "booleans", "lists"}:
                raise self.fail("top level", f"unknown key `{key}`")
        titles, headings, nouns, fillers = (
            self.texts(self.data, key, "top level", 1) for key in ("titles", "headings", "nouns", "fillers")
        )
        attributes = tuple(self.attribute(place, table, Attribute) for place, table in self.tables("attributes"))
        if len(attributes) < 3:
            raise self.fail("top level", f"a domain needs at least 3 attributes, got {len(attributes)}")
        return Domain(
            self.name,
            titles,
            headings,
            nouns,
            fillers,
            attributes,
            tuple(self.label(place, table) for place, table in self.tables("labels")),
            tuple(self.boolean(place, table) for place, table in self.tables("booleans")),
            tuple(self.attribute(place, table, ListFact) for place, table in self.tables("lists")),
        )


def domain_files() -> list[Path]:
    """Return the domain files in the order of their names."""
    return sorted((Path(__file__).parent / "domains").glob("*.toml"))


def read_domain(file: Path) -> Domain:
    """Read and check a domain file; raise DomainError if it does not follow the schema."""
    name = file.name.removesuffix(".toml")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DomainError(f"{file.name}: {error}") from error
    return _Reader(name, data).domain()


@cache
def all_domains() -> tuple[Domain, ...]:
    """Return all domains, whole; files are read once."""
    return tuple(read_domain(file) for file in domain_files())


@cache
def domains(split: str) -> tuple[Domain, ...]:
    """Return the domains of a split, with only the clauses and questions of that split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if split == "domain":
        return tuple(domain for domain in all_domains() if domain.name in HELD_OUT_DOMAINS)
    kept = tuple(domain for domain in all_domains() if domain.name not in HELD_OUT_DOMAINS)
    uses = Counter(text.lower() for domain in kept for topic in domain.topics for text in topic.asked)
    kept_out = frozenset(_kept_question(topic, uses).lower() for domain in kept for topic in domain.topics)
    return tuple(_cut(domain, split == "phrasing", uses, kept_out) for domain in kept)


def _kept_question(topic: Topic, uses: Counter[str]) -> str:
    """Return the last question of a topic that is not common: training needs common ones such as `What is {e}?`."""
    return next((text for text in reversed(topic.asked) if uses[text.lower()] <= COMMON_USES), topic.asked[-1])


def _cut(domain: Domain, evaluation: bool, uses: Counter[str], kept_out: frozenset[str]) -> Domain:
    def cut(topic: Any) -> Any:
        last = -1 if len(topic.stated) >= 3 else len(topic.stated)
        picked = slice(last, None) if evaluation and last == -1 else slice(0, last)
        asked = (_kept_question(topic, uses),) if evaluation else _without(topic.asked, kept_out)
        changes: dict[str, Any] = {"stated": topic.stated[picked], "asked": asked}
        if isinstance(topic, Boolean):
            changes["denied"] = topic.denied[picked]
        return replace(topic, **changes)

    groups: dict[str, Any] = {
        key: tuple(map(cut, getattr(domain, key))) for key in ("attributes", "labels", "booleans", "lists")
    }
    return replace(domain, **groups)


def _without(questions: tuple[str, ...], kept_out: frozenset[str]) -> tuple[str, ...]:
    """Leave out the questions that are held out; if none remains, keep the first."""
    return tuple(text for text in questions if text.lower() not in kept_out) or questions[:1]
