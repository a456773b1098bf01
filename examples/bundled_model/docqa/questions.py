"""Turns about a generated document: questions in many styles, and answers that quote the document and cite the page.

Kinds of turn: fact, yes_no, list, count, comparison, follow_up and unanswerable. An answer comes to the value at once, as in
`The document says: 9:40 [p. 2].`: to find the value, a model needs only the words before it in the document and the question.
A conclusion stands after the values that it follows from. The answer to an unanswerable question is phrases.UNKNOWN. Knows
nothing of layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from bundled_model.docqa.asking import WHAT_ABOUT, ask, follow_up_question, is_noun, styled
from bundled_model.docqa.chat import GENERAL_QUESTIONS, filled
from bundled_model.docqa.comparisons import DEGREES, GENERAL, SPECIAL, measured
from bundled_model.docqa.document import Document
from bundled_model.docqa.domains import Attribute, Boolean, Domain, Label, Topic
from bundled_model.docqa.facts import Fact, Pair, capital, fill, make_entity, make_label
from bundled_model.docqa.phrases import CHECKS, SAYS, TITLE_QUESTIONS, UNKNOWN
from bundled_model.docqa.values import VALUES

_PLURALS = {
    "person": "people",
    "animal": "animals",
    "plant": "plants",
    "company": "companies",
    "product": "products",
    "language": "languages",
    "country": "countries",
    "room": "rooms",
    "team": "teams",
    "event": "events",
    "material": "materials",
    "subject": "subjects",
    "place": "places",
}

# Shares of the draws. A plain question takes the place of a comparison or a follow-up that the document does not allow.
COMPARISON_SHARE, FOLLOW_UP_SHARE, COUNT_SHARE, CHECK_SHARE = 0.05, 0.26, 0.3, 0.04


class Turn(NamedTuple):
    """A question and its answer. focus: the value in the answer; about: the pair that the question asks for, or None."""

    question: str
    answer: str
    kind: str
    focus: str = ""
    page: int = 0
    about: Pair | None = None


@dataclass(slots=True)
class Interview:
    """Draws turns about a document. Remembers the last fact, for follow-ups, and the unanswerable pairs asked so far."""

    rng: Random
    document: Document
    pool: Sequence[Domain]
    unknown_share: float
    open_facts: list[Fact] = field(init=False)
    asked: set[str] = field(default_factory=set)
    last: Fact | None = None

    def __post_init__(self) -> None:
        self.open_facts = self.rng.sample(self.document.facts, len(self.document.facts))

    def turns(self, number: int) -> list[Turn]:
        """Draw up to `number` turns. Plain and follow-up questions ask for a fact only once."""
        turns: list[Turn] = []
        while len(turns) < number and self.open_facts:
            turns.append(self._turn())
        return turns

    def _turn(self) -> Turn:
        draw = self.rng.random()
        turn: Turn | None = None
        if draw < self.unknown_share:
            turn = self._unanswerable()
        elif draw < self.unknown_share + COMPARISON_SHARE:
            turn = self._comparison()
        elif draw < self.unknown_share + COMPARISON_SHARE + FOLLOW_UP_SHARE:
            turn = self._follow_up()
        return turn or self._plain()

    def _plain(self) -> Turn:
        fact = self.open_facts.pop()
        self.last = fact
        if len(fact.items) > 1 and self.rng.random() < COUNT_SHARE and (turn := self._count(fact)):
            return turn
        if isinstance(fact.topic, Attribute | Label) and self.rng.random() < CHECK_SHARE:
            return self._check(fact)
        question = ask(self.rng, fact.entity, fact.topic)
        return Turn(question, answer_of(fact), fact.kind, fact.value, fact.page, (fact.entity, fact.topic))

    def _count(self, fact: Fact) -> Turn | None:
        """Ask how many values a list has, in the words of its name or its clause."""
        number, name = len(fact.items), fact.topic.name
        forms: list[str] = []
        if name.endswith("s"):
            forms = [f"How many {name} {rest}?" for rest in ("of {e} are there", "are named for {e}")]
            forms.append(f"What is the number of {name} of {{e}}?")
        plural = _PLURALS.get(fact.topic.value, "")
        rest = fact.form.removeprefix("{v} ")
        if plural and rest != fact.form and not rest.startswith(("is ", "was ", "has ")):
            forms.append(f"How many {plural} {rest}?")
        if not forms:
            return None
        question = styled(self.rng, fill(self.rng.choice(forms), fact.entity), fact.entity)
        answer = f"{SAYS} {fact.value} [p. {fact.page}], so {number}."
        return Turn(question, answer, "count", f"so {number}", fact.page)

    def _check(self, fact: Fact) -> Turn:
        """Ask whether a value is right: the fact's own value or a wrong one, more often that of another entity than a new value."""
        rng = self.rng
        other_values = [
            other.value for other in self.document.facts if other.topic is fact.topic and other.value != fact.value
        ]
        value = fact.value
        if rng.random() < 0.5:
            use_other = other_values and rng.random() < 0.6
            value = rng.choice(other_values) if use_other else VALUES[fact.topic.value](rng)
        claim = fill(fact.form, fact.entity, value)
        question = capital(rng.choice(CHECKS).format(claim))
        answer = f"{'Yes' if value == fact.value else 'No'}, {SAYS.lower()} {fact.value} [p. {fact.page}]."
        return Turn(question, answer, "yes_no", fact.value, fact.page, (fact.entity, fact.topic))

    def _comparison(self) -> Turn | None:
        """Ask for the greater or smaller of two values of an attribute in the same unit."""
        rng = self.rng
        by_unit: dict[tuple[Topic, str], list[tuple[float, Fact]]] = {}
        for fact in self.document.facts:
            if isinstance(fact.topic, Attribute) and (measure := measured(fact.topic.value, fact.value)):
                by_unit.setdefault((fact.topic, measure.unit), []).append((measure.number, fact))
        groups = [group for (topic, _), group in by_unit.items() if len(group) > 1 and is_noun(topic)]
        if not groups:
            return None
        (first_number, first), (second_number, second) = rng.sample(rng.choice(groups), 2)
        if first_number == second_number:
            return None
        kind, name = first.topic.value, first.topic.name
        less = rng.randrange(2)
        forms = [SPECIAL[name][less]] if name in SPECIAL and rng.random() < 0.6 else GENERAL
        word = "Which" if first.entity.pronoun == "it" else "Who"
        question = rng.choice(forms).format(
            a=first.entity.phrase, b=second.entity.phrase, w=word, d=DEGREES[kind][less], n=name
        )
        high = first if (first_number > second_number) != bool(less) else second
        winner = f"so {high.entity.phrase}"
        quotes = ", ".join(f"{fact.entity.phrase} {fact.value} [p. {fact.page}]" for fact in (first, second))
        answer = f"{SAYS} {quotes}, {winner}."
        self.last = None
        return Turn(styled(rng, question, first.entity), answer, "comparison", winner, high.page)

    def _follow_up(self) -> Turn | None:
        """Ask for another topic of the last entity, by pronoun or ellipsis, or for the same topic of another entity."""
        rng, last = self.rng, self.last
        if last is None or isinstance(last.topic, Label):
            return None
        if rng.random() < self.unknown_share / 2 and (turn := self._unanswerable_follow_up(last)):
            return turn
        same_topic = [fact for fact in self.open_facts if fact.topic is last.topic and fact.entity != last.entity]
        same_entity = [fact for fact in self.open_facts if fact.entity == last.entity]
        if same_topic and (not same_entity or rng.random() < 0.35):
            fact = rng.choice(same_topic)
            question = rng.choice(WHAT_ABOUT).format(fact.entity.phrase)
        elif same_entity:
            fact = rng.choice(same_entity)
            question = follow_up_question(rng, fact.entity, fact.topic)
        else:
            return None
        self.open_facts.remove(fact)
        self.last = fact
        question = question.rstrip("?").lower() if rng.random() < 0.08 else question
        return Turn(question, answer_of(fact), "follow_up", fact.value, fact.page, (fact.entity, fact.topic))

    def _unanswerable_follow_up(self, last: Fact) -> Turn | None:
        missing = [pair for pair in self.document.missing if pair[0] == last.entity]
        if not missing or not self._is_new(pair := self.rng.choice(missing)):
            return None
        question = follow_up_question(self.rng, *pair)
        return Turn(question, UNKNOWN, "unanswerable", about=pair)

    def _is_new(self, pair: Pair) -> bool:
        """Whether the document does not state the pair and no turn has asked for it."""
        key = f"{pair[0].noun} {pair[1].heading}"
        if key in self.asked or is_answerable(self.document, pair):
            return False
        self.asked.add(key)
        return True

    def _unanswerable(self) -> Turn | None:
        """Ask for a pair that the document could state but does not, for a pair of another domain, or for general knowledge."""
        rng = self.rng
        if rng.random() < 0.06:
            self.last = None
            return Turn(filled(rng, rng.choice(GENERAL_QUESTIONS)), UNKNOWN, "unanswerable")
        for _ in range(4):
            pair = self._foreign_pair() if rng.random() < 0.2 else self._near_miss()
            if pair is not None and self._is_new(pair):
                self.last = None
                return Turn(ask(rng, *pair), UNKNOWN, "unanswerable", about=pair)
        return None

    def _near_miss(self) -> Pair | None:
        rng, document = self.rng, self.document
        stated = [fact for fact in document.facts if fact.topic in document.domain.entity_topics]
        if stated and rng.random() < 0.3:
            return make_entity(rng, rng.choice(document.domain.nouns)), rng.choice(stated).topic
        return rng.choice(document.missing) if document.missing else None

    def _foreign_pair(self) -> Pair | None:
        rng = self.rng
        domain = rng.choice(self.pool)
        if domain.name == self.document.domain.name:
            return None
        if domain.labels and rng.random() < 0.3:
            label = rng.choice(domain.labels)
            return make_label(rng, label), label
        return make_entity(rng, rng.choice(domain.nouns)), rng.choice(domain.entity_topics)


def is_answerable(document: Document, pair: Pair) -> bool:
    """Whether the document answers, or could be read to answer, a question for the pair.

    It could be read so if an entity of a fact has all words of the pair's entity, or the other way round, and their topics share a
    name or a question.
    """
    entity, topic = pair
    words, names = set(entity.noun.lower().split()), {topic.name, *topic.asked} - {""}
    for fact in document.facts:
        stated = set(fact.entity.noun.lower().split())
        akin = stated <= words or words <= stated
        if isinstance(topic, Label) or isinstance(fact.topic, Label):
            asked_words, stated_words = set(topic.name.split()) or words, set(fact.topic.name.split()) or stated
            if akin or asked_words <= stated_words or stated_words <= asked_words:
                return True
        elif akin and (fact.topic is topic or not names.isdisjoint({fact.topic.name, *fact.topic.asked})):
            return True
    return False


def answer_of(fact: Fact) -> str:
    """Return the answer to a question for the fact."""
    quote = fact.value if isinstance(fact.topic, Boolean) else f"{SAYS} {fact.value}"
    return f"{quote} [p. {fact.page}]."


def title_turn(rng: Random, document: Document) -> Turn:
    """Ask what the document is. The answer is its heading."""
    answer = f"{SAYS} {document.heading} [p. 1]."
    return Turn(rng.choice(TITLE_QUESTIONS), answer, "fact", document.heading, 1)
