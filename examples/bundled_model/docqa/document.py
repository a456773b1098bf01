"""Generated documents: pages of blocks about the entities of a domain, with their facts, and the pairs that they leave out.

A document draws a domain, entities and topics, gives a value to each pair of entity and topic, and lays out the facts (layout.py)
under headings, with fillers between them, until its pages are full. A `unique` document states every topic once, like most short
documents of people. In other documents several entities share a topic, so that finding a value needs entity and topic. The
`random.Random` decides everything. Knows nothing of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from bundled_model.docqa.domains import Domain, Topic
from bundled_model.docqa.facts import Draft, Entity, Fact, Pair, make_entities, make_entity, make_label
from bundled_model.docqa.layout import LAYOUTS, filler, wrapped
from bundled_model.docqa.names import invented
from bundled_model.docqa.phrases import SUBTITLES

_MAKERS = [maker for maker, _ in LAYOUTS]
_WEIGHTS = [weight for _, weight in LAYOUTS]


@dataclass(slots=True)
class Document:
    """Pages of wrapped text under a heading, and their facts. `missing`: pairs that the document could state but does not."""

    title: str
    heading: str
    pages: list[str]
    facts: list[Fact]
    missing: list[Pair]
    domain: Domain


def document_message(title: str, pages: list[str], system: str = "") -> str:
    """Return the system message that carries a document: byte for byte the format of the engine."""
    body = "\n\n".join(f"[p. {number}]\n{page}" for number, page in enumerate(pages, 1))
    text = f'<document title="{title}">\n{body}\n</document>'
    return f"{text}\n\n{system}" if system else text


def make_document(rng: Random, target_chars: int, unique: bool, pool: Sequence[Domain]) -> Document:
    """Make a document of about `target_chars` characters, on one or more pages, about a domain of the pool."""
    domain = rng.choice(pool)
    pairs = _draw_unique_pairs(rng, domain, pool, target_chars) if unique else _draw_pairs(rng, domain, target_chars)
    held_back = [pairs.pop() for _ in range(min(len(pairs) - 1, max(2, len(pairs) // 7)))]
    draft = Draft(rng, domain, pairs)
    place = invented(rng) if domain.people else f"{invented(rng)} {rng.choice(domain.nouns).title()}"
    title = rng.choice(domain.titles)
    heading = f"{place} - {title}" if rng.random() < 0.6 else title
    pages = _make_pages(draft, heading, target_chars)
    unused = _unused_pairs(rng, domain, draft.facts)
    missing = held_back + draft.pairs + unused
    return Document(_file_name(rng, title, place), heading, pages, draft.facts, missing, domain)


def _file_name(rng: Random, title: str, place: str) -> str:
    stem = rng.choice((title, title, place, invented(rng), f"{title} {rng.randint(1, 2030)}", "sample", "document"))
    for mark in "'\",":
        stem = stem.replace(mark, "")
    return f"{stem.lower().replace(' ', rng.choice('-_')) if rng.random() < 0.8 else stem}.pdf"


def _make_pages(draft: Draft, heading: str, target_chars: int) -> list[str]:
    rng = draft.rng
    width = rng.randint(60, 95)
    draft.headings = rng.sample(draft.domain.headings, len(draft.domain.headings))
    num_pages = 1 if target_chars < 350 else rng.randint(1, 2) if target_chars < 800 else rng.randint(2, 4)
    if target_chars > 3600:
        num_pages = rng.randint(target_chars // 2500 + 1, target_chars // 900)
    running_head = heading if rng.random() < 0.15 else ""
    footer = rng.choice(("Page {} of {}", "- {} -", "{}/{}", "Page {}")) if rng.random() < 0.15 else ""
    separators = rng.choice((("\n",), ("\n", "\n", "\n\n"), ("\n\n",)))
    pages: list[str] = []
    for number in range(1, num_pages + 1):
        draft.page = number
        blocks = [heading] if number == 1 else [running_head] if running_head else []
        if number == 1 and rng.random() < 0.3:
            blocks.append(rng.choice(SUBTITLES))
        _fill_page(draft, blocks, target_chars // num_pages, width)
        if footer:
            blocks.append(footer.format(number, num_pages))
        text = blocks[0]
        for block in blocks[1:]:
            text += rng.choice(separators) + block
        pages.append(text)
    return pages


def _fill_page(draft: Draft, blocks: list[str], target_chars: int, width: int) -> None:
    rng = draft.rng
    size, empty = sum(map(len, blocks)), True
    while size < target_chars or empty:
        if draft.pairs:
            block = rng.choices(_MAKERS, _WEIGHTS)[0](draft, width)
        else:
            block = wrapped(" ".join(filler(draft) for _ in range(rng.randint(1, 3))), width)
        if block:
            if rng.random() < 0.35 and draft.headings:
                blocks.append(draft.headings.pop())
            blocks.append(block)
            size += len(block) + 1
            empty = False


def pick_topics(rng: Random, topics: Sequence[Any], number: int) -> list[Any]:
    """Pick up to `number` topics; no two of them share a name or a question."""
    picked: list[Topic] = []
    names: set[str] = set()
    for topic in rng.sample(topics, len(topics)):
        topic_names = {topic.name, *topic.asked} - {""}
        if len(picked) < number and names.isdisjoint(topic_names):
            picked.append(topic)
            names |= topic_names
    return picked


def _draw_pairs(rng: Random, domain: Domain, target_chars: int) -> list[Pair]:
    """Pair several entities with the same topics; add other topics for half of the entities, and labels in most documents."""
    entities = make_entities(rng, domain, max(2, min(40, target_chars // 220 + rng.randint(0, 2))))
    topics = pick_topics(rng, domain.attributes, rng.randint(3, 8))
    shared = [(entity, topic) for entity in entities for topic in topics]
    extras = pick_topics(rng, (*domain.booleans, *domain.lists), rng.randint(0, 4))
    shared += [(entity, topic) for entity in entities for topic in extras if rng.random() < 0.5]
    pairs: list[Pair] = shared
    if rng.random() < 0.6:
        pairs = pairs + _draw_labels(rng, domain, max(2, len(pairs) // 5))
    rng.shuffle(pairs)
    return pairs


def _draw_unique_pairs(rng: Random, domain: Domain, pool: Sequence[Domain], target_chars: int) -> list[Pair]:
    """Draw an entity for every topic, from more domains if the first has too few topics."""
    number = 5 + target_chars // 55
    pairs: dict[Topic, Pair] = {}
    names: set[str] = set()
    labels: list[Pair] = []
    for source in (domain, *rng.sample(pool, min(len(pool), 1 + target_chars // 1500))):
        entities = make_entities(rng, source, 3 + number // 3)
        topics = pick_topics(rng, (*source.attributes, *source.booleans, *source.lists), number)
        for topic in topics:
            topic_names = {topic.name, *topic.asked} - {""}
            if topic not in pairs and names.isdisjoint(topic_names):
                names |= topic_names
                entity = rng.choice(entities) if rng.random() < 0.5 else make_entity(rng, rng.choice(source.nouns))
                pairs[topic] = (entity, topic)
        labels += _draw_labels(rng, source, max(2, len(topics) // 2))
        if len(pairs) + len(labels) >= number:
            break
    drawn = [*pairs.values(), *_distinct_labels(labels)]
    rng.shuffle(drawn)
    return drawn[: max(3, number)]


def _draw_labels(rng: Random, domain: Domain, number: int) -> list[Pair]:
    if not domain.labels:
        return []
    topics = [rng.choice(domain.labels) for _ in range(number)]
    return _distinct_labels([(make_label(rng, topic), topic) for topic in topics])


def _distinct_labels(pairs: list[Pair]) -> list[Pair]:
    return list({entity.noun: (entity, topic) for entity, topic in pairs}.values())


def _unused_pairs(rng: Random, domain: Domain, facts: list[Fact]) -> list[Pair]:
    """Pair some entities of the document with topics that the document does not state for them."""
    stated = {(fact.entity, fact.topic) for fact in facts}
    entities: list[Entity] = [fact.entity for fact in facts if fact.topic in domain.entity_topics]
    if not entities:
        return []
    drawn = [(rng.choice(entities), rng.choice(domain.entity_topics)) for _ in range(4)]
    return [pair for pair in dict.fromkeys(drawn) if pair not in stated]
