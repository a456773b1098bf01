"""Invented names: of people, places, companies, books, products, events and teams.

Every function draws a name from a `random.Random`. Most names are made of syllables, so that no list holds them all. The word
lists are in words.py.
"""

from __future__ import annotations

from random import Random

from bundled_model.docqa.words import (
    EVENTS,
    FIRST_NAMES,
    LAST_NAMES,
    PRODUCTS,
    SYLLABLES,
    TEAMS,
    TITLE_NOUNS,
    TITLE_WORDS,
)

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"


def invented(rng: Random) -> str:
    """Return a capitalised word of two or three syllables that is in no list."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 2, 3)))).capitalize()


def letters(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def digits(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(DIGITS, k=rng.randint(low, high)))


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.75 else invented(rng)


def last_name(rng: Random) -> str:
    return rng.choice(LAST_NAMES) if rng.random() < 0.5 else invented(rng)


def person(rng: Random) -> str:
    shape = rng.random()
    if shape < 0.05:
        return f"{rng.choice(('Mr', 'Ms', 'Professor', 'Captain'))} {last_name(rng)}"
    middle = f"{rng.choice(LETTERS)}. " if shape > 0.94 else ""
    title = "Dr " if shape < 0.11 else ""
    return f"{title}{first_name(rng)} {middle}{last_name(rng)}"


def place(rng: Random) -> str:
    return rng.choice(("", "", "", "Port ", "North ", "Lower ", "Saint ", "Upper ", "New ", "Bad ")) + invented(rng)


def company(rng: Random) -> str:
    ending = rng.choice("Ltd|and Sons|Group|Works|Trading|Labs|Press|Motors|GmbH|Inc|Partners|Systems|& Co".split("|"))
    return f"{last_name(rng)} {ending}"


def title(rng: Random) -> str:
    forms = (
        f"The {rng.choice(TITLE_WORDS)} {rng.choice(TITLE_NOUNS)}",
        f"{rng.choice(TITLE_NOUNS)} of {invented(rng)}",
        f"{invented(rng)} {rng.choice(TITLE_NOUNS)}",
        f"{rng.choice(TITLE_WORDS)} {rng.choice(TITLE_NOUNS)}s",
    )
    return rng.choice(forms)


def product(rng: Random) -> str:
    name = invented(rng)
    return rng.choice(
        (f"{name} {rng.randint(2, 990)}", f"{name} {rng.choice(PRODUCTS)}", f"{name} {letters(rng, 1, 2)}")
    )


def event(rng: Random) -> str:
    return f"{rng.choice((invented, last_name))(rng)} {rng.choice(EVENTS)}"


def team(rng: Random) -> str:
    return f"{invented(rng)} {rng.choice(TEAMS)}"
