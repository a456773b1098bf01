"""Questions as people type them: frames, missing capitals and question marks, keywords, typing errors, pronouns, ellipses.

Knows topics and entities, nothing of documents.
"""

from __future__ import annotations

import re
from random import Random

from bundled_model.docqa.comparisons import SPECIAL
from bundled_model.docqa.domains import Attribute, Label, ListFact, Topic
from bundled_model.docqa.facts import POSSESSIVES, Entity, capital, fill
from bundled_model.docqa.phrases import ASKS

_STYLES = [style for style, _ in ASKS]
_STYLE_WEIGHTS = [weight for _, weight in ASKS]
_OBJECTS = {"it": "it", "he": "him", "she": "her"}
_AUXILIARIES = frozenset(
    "is are was were does did do has have had can could may must should will would might shall if that when how".split()
)
_OWNED = re.compile(r"\bthe ((?:[a-z-]+ ){0,2}[a-z-]+) of $")
_AND = ("And {}", "And {}", "{}", "Ok, and {}", "Thanks. And {}")
WHAT_ABOUT = ("What about {}?", "And {}?", "And what about {}?", "How about {}?", "The same for {}?")


def ask(rng: Random, entity: Entity, topic: Topic) -> str:
    """Phrase a question that asks for a topic of an entity."""
    draw = rng.random()
    if draw < 0.05 and isinstance(topic, Attribute | ListFact):
        forms = ("{n} {a}", "{a} {n}", "{a} of {e}", "{n}: {a}?", "{a} {n}?")
        return rng.choice(forms).replace("{a}", topic.name).replace("{e}", entity.phrase).replace("{n}", entity.noun)
    if draw < 0.03 and isinstance(topic, Label):
        return entity.noun
    question = fill(rng.choice(topic.asked), entity)
    if draw > 0.98:
        question = question.replace(entity.phrase, entity.noun)
    return styled(rng, question, entity)


def styled(rng: Random, question: str, entity: Entity) -> str:
    """Return the question as people type it: in a frame, without capitals or question mark, with a typing error."""
    draw = rng.random()
    if draw < 0.07:
        return question.rstrip("?.").lower()
    if draw < 0.1:
        return capital(question.rstrip("?."))
    if draw < 0.12:
        question = _with_slip(rng, question, entity)
    style = rng.choices(_STYLES, _STYLE_WEIGHTS)[0]
    return style.format(capital(question) if style[0] == "{" or style[-4] in "?!" else _lower(question, entity))


def _lower(question: str, entity: Entity) -> str:
    """Return the question as it stands after a comma or a colon: lower case, unless it starts with a name."""
    starts_with_name = question.startswith((entity.noun, "I ")) and not entity.noun[0].islower()
    return question if starts_with_name else question[:1].lower() + question[1:]


def _with_slip(rng: Random, question: str, entity: Entity) -> str:
    """Swap two letters of a word; words of the entity are never changed."""
    entity_words = set(entity.noun.lower().split())
    words = question.split(" ")
    places = [
        index
        for index, word in enumerate(words)
        if len(word) > 4 and word.isalpha() and word.lower() not in entity_words
    ]
    if places:
        index = rng.choice(places)
        word, at = words[index], rng.randrange(1, len(words[index]) - 1)
        words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def is_noun(topic: Topic) -> bool:
    """Whether the topic's name is a noun, so that a question can ask for `the higher NAME`."""
    return topic.name in SPECIAL or any(
        f"the {topic.name} " in text for text in (*topic.stated, *topic.asked, topic.answer)
    )


def follow_up_question(rng: Random, entity: Entity, topic: Topic) -> str:
    """Phrase a question that asks for a topic of the entity of the last question."""
    if isinstance(topic, Attribute) and rng.random() < 0.35:
        if not is_noun(topic):
            return capital(f"{topic.name}?")
        owner = POSSESSIVES[entity.pronoun]
        forms = ("And the {}?", f"And {owner} {{}}?", "What about the {}?", "{}?", f"What about {owner} {{}}?")
        return capital(rng.choice(forms).format(topic.name))
    questions = [form for form in topic.asked if form.count("{e}") == 1 and "{n}" not in form]
    if not questions:
        return f"What else? {ask(rng, entity, topic)}"
    question = with_pronoun(rng.choice(questions), entity)
    style = rng.choice(_AND)
    return question if style == "{}" else style.format(question[0].lower() + question[1:])


def with_pronoun(form: str, entity: Entity) -> str:
    """Put the entity's pronoun into a question, in the right grammatical case."""
    before, _, after = form.partition("{e}")
    if match := _OWNED.search(before):
        text = f"{before[: match.start()]}{POSSESSIVES[entity.pronoun]} {match[1]}{after}"
    elif after.startswith("'s"):
        text = f"{before}{POSSESSIVES[entity.pronoun]}{after[2:]}"
    else:
        words = before.split()
        subject = not words or words[-1].lower() in _AUXILIARIES
        text = f"{before}{entity.pronoun if subject else _OBJECTS[entity.pronoun]}{after}"
    return capital(text)
