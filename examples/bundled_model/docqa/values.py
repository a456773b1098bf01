"""Open sets of values for the document generator: codes, numbers, dates, amounts, and the names of names.py.

Every function draws a value from a `random.Random`. The sets are open on purpose: a model cannot know the value of a document by
heart, so it must copy the value. Knows nothing of documents, questions or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from bundled_model.docqa import words
from bundled_model.docqa.names import (
    DIGITS,
    company,
    digits,
    event,
    invented,
    last_name,
    letters,
    person,
    place,
    product,
    team,
    title,
)
from bundled_model.docqa.words import MONTHS, WEEKDAYS

Draw = Callable[[Random], str]


def room(rng: Random) -> str:
    forms = (
        f"room {rng.randint(1, 499)}",
        f"hall {rng.choice('ABCDEFGH')}{rng.choice(('', rng.randint(1, 9)))}",
        f"the {invented(rng)} room",
        f"building {rng.randint(1, 40)}",
        f"the {rng.choice(('blue', 'green', 'upper', 'east', 'old', 'glass', 'west'))} hall",
        f"room {rng.choice('ABCDEFG')}.{rng.randint(1, 40)}",
    )
    return rng.choice(forms)


def address(rng: Random) -> str:
    street = rng.choice(("Street", "Road", "Lane", "Square", "Avenue", "Way", "Drive", "Court"))
    return f"{rng.randint(1, 199)} {rng.choice((last_name, invented))(rng)} {street}"


def clock(rng: Random) -> str:
    hour, minute = rng.randint(6, 22), rng.choice((0, 15, 30, 45, rng.randint(0, 59)))
    if rng.random() < 0.3:
        return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    return f"{hour}:{minute:02d}"


def hours(rng: Random) -> str:
    start = rng.randint(6, 12)
    return f"{start}:{rng.choice(('00', '15', '30', '45'))} to {rng.randint(start + 3, 23)}:{rng.choice(('00', '30'))}"


def date(rng: Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    year = rng.randint(1985, 2032)
    shape = rng.random()
    if shape < 0.06:
        return f"{year}-{rng.randint(1, 12):02d}-{day:02d}"
    if shape < 0.12:
        return f"{month} {day}, {year}"
    return f"{month} {day}" if shape < 0.3 else f"{day} {month}" + (f" {year}" if shape < 0.65 else "")


def date_range(rng: Random) -> str:
    first = rng.randrange(11)
    return f"{rng.randint(1, 28)} {MONTHS[first]} to {rng.randint(1, 28)} {MONTHS[rng.randint(first + 1, 11)]}"


def year(rng: Random) -> str:
    return str(rng.randint(1890, 2029))


def year_range(rng: Random) -> str:
    start = rng.randint(1890, 2015)
    return f"{start} to {start + rng.randint(1, 24)}"


def weekday(rng: Random) -> str:
    if rng.random() < 0.3:
        first = rng.randrange(5)
        return f"{WEEKDAYS[first]} to {WEEKDAYS[rng.randint(first + 1, 6)]}"
    return rng.choice(WEEKDAYS) + rng.choice(("", "s"))


def money(rng: Random) -> str:
    amount = rng.choice((rng.randint(1, 99), rng.randint(100, 999), rng.randint(1000, 98000)))
    cents = f".{rng.randint(0, 99):02d}" if rng.random() < 0.45 else ""
    number = f"{amount:,}" if rng.random() < 0.5 else str(amount)
    forms = ("${}", "£{}", "EUR {}", "{} euros", "€{}", "{} dollars", "CHF {}", "{} pounds")
    return rng.choice(forms).format(number + cents)


def percent(rng: Random) -> str:
    number = f"{rng.randint(1, 99)}.{rng.randint(1, 9)}" if rng.random() < 0.3 else str(rng.randint(1, 99))
    return f"{number}{rng.choice(('%', ' percent', '%'))}"


def code(rng: Random) -> str:
    first, second = letters(rng, 1, 3), digits(rng, 2, 5)
    return rng.choice((f"{first}-{second}", f"{first}{second}", second + rng.choice(DIGITS), f"{second}/{first}"))


def serial(rng: Random) -> str:
    parts = [rng.choice((letters(rng, 2, 3), digits(rng, 2, 4))) for _ in range(rng.randint(2, 3))]
    return rng.choice("-. ").join([*parts, digits(rng, 3, 5)])


def phone(rng: Random) -> str:
    start = f"+{rng.randint(1, 99)} {rng.randint(10, 999)}" if rng.random() < 0.2 else f"0{rng.randint(10, 999)}"
    return f"{start} {rng.randint(100, 999)} {rng.randint(10, 9999)}"


def email(rng: Random) -> str:
    user = rng.choice(("info", "office", "help", "desk", "team", "booking", last_name(rng).lower().replace("'", "")))
    return f"{user}@{_host(rng)}"


def url(rng: Random) -> str:
    path = rng.choice(("", "", f"/{invented(rng).lower()}", f"/{rng.choice(('help', 'docs', 'join', 'news', 'map'))}"))
    return rng.choice(("www.", "https://", "")) + _host(rng) + path


def _host(rng: Random) -> str:
    return f"{invented(rng).lower()}.{rng.choice(('org', 'com', 'example', 'net', 'info'))}"


def count(rng: Random) -> str:
    return str(rng.choice((rng.randint(2, 30), rng.randint(2, 400), rng.randint(2, 9000))))


def version(rng: Random) -> str:
    return f"{rng.randint(0, 12)}.{rng.randint(0, 30)}" + (f".{rng.randint(0, 20)}" if rng.random() < 0.7 else "")


def coordinates(rng: Random) -> str:
    north, east = rng.uniform(0.1, 80), rng.uniform(0.1, 170)
    return f"{north:.{rng.randint(2, 4)}f} {rng.choice('NS')}, {east:.{rng.randint(2, 4)}f} {rng.choice('EW')}"


def ratio(rng: Random) -> str:
    return f"{rng.randint(1, 9)}:{rng.randint(2, 60)}"


def score(rng: Random) -> str:
    high = rng.choice((6, 12, 110))
    return f"{rng.randint(0, high)}-{rng.randint(0, high)}"


def rating(rng: Random) -> str:
    top = rng.choice((5, 10))
    number = f"{rng.randint(1, top - 1)}.{rng.randint(1, 9)}" if rng.random() < 0.6 else str(rng.randint(1, top))
    return rng.choice((f"{number} out of {top}", f"{number}/{top}", f"{number} stars"))


def grade(rng: Random) -> str:
    letter = rng.choice("ABCD") + rng.choice(("", "+", "-"))
    return rng.choice((letter, f"{rng.randint(1, 5)}.{rng.randint(0, 9)}", f"{rng.randint(20, 99)} points"))


def currency_rate(rng: Random) -> str:
    first, second = rng.sample(("EUR", "USD", "GBP", "CHF", "JPY", "SEK", "PLN"), 2)
    return f"{rng.uniform(0.1, 160):.{rng.randint(2, 4)}f} {first} per {second}"


def temperature_range(rng: Random) -> str:
    low = rng.randint(-20, 180)
    return f"{low} to {low + rng.randint(3, 90)} {rng.choice(('°C', 'degrees', '°C'))}"


def measure(*units: str) -> Draw:
    """Return a function that draws a number with one of the units."""

    def draw(rng: Random) -> str:
        shape = rng.randrange(3)
        if shape == 2:
            return f"{rng.randint(1, 90)}.{rng.randint(1, 9)} {rng.choice(units)}"
        return f"{rng.randint(2, 99) if shape else rng.randint(100, 2400)} {rng.choice(units)}"

    return draw


def chosen(options: list[str], before: list[str], share: float) -> Draw:
    """Return a function that draws an option; a share of the draws has a word of `before` in front."""

    def draw(rng: Random) -> str:
        option = rng.choice(options)
        return f"{rng.choice(before)} {option}" if rng.random() < share else option

    return draw


def job(rng: Random) -> str:
    text = rng.choice(words.JOBS)
    return f"{text} in {invented(rng)}" if rng.random() < 0.3 else text


def named(options: list[str], share: float) -> Draw:
    """Return a function that draws an option; a share of the draws is an invented name instead."""
    return lambda rng: invented(rng) if rng.random() < share else rng.choice(options)


_FUNCTIONS: tuple[Draw, ...] = (
    person,
    place,
    company,
    room,
    address,
    clock,
    hours,
    date,
    date_range,
    year,
    year_range,
    weekday,
    money,
    percent,
    code,
    serial,
    phone,
    email,
    url,
    count,
    version,
    coordinates,
    ratio,
    score,
    rating,
    grade,
    currency_rate,
    temperature_range,
    title,
    product,
    event,
    team,
    job,
)
VALUES: dict[str, Draw] = {
    **{draw.__name__: draw for draw in _FUNCTIONS},
    "duration": lambda rng: f"{rng.randint(2, 90)} {rng.choice(('minutes', 'hours', 'days', 'weeks', 'months'))}",
    "age": lambda rng: f"{rng.randint(3, 99)} years",
    "length": measure("m", "cm", "mm", "km", "metres"),
    "area": measure("m²", "hectares", "square metres", "km²"),
    "weight": measure("kg", "g", "tonnes"),
    "power": measure("watts", "kW", "volts", "amps"),
    "energy": measure("kWh", "kJ", "joules", "MJ"),
    "pressure": measure("bar", "kPa", "psi", "hPa"),
    "frequency": measure("Hz", "kHz", "MHz", "GHz"),
    "data": measure("MB", "GB", "kB", "TB"),
    "dose": measure("mg", "ml", "drops", "µg"),
    "temperature": measure("degrees", "°C"),
    "speed": measure("km/h", "mph", "m/s"),
    "volume": measure("litres", "ml"),
    "subject": chosen(words.SUBJECTS, words.KIND_WORDS, 0.35),
    "colour": chosen(words.COLOURS, words.SHADES, 0.4),
    "material": chosen(words.MATERIALS, words.KIND_WORDS, 0.3),
    "animal": chosen(words.ANIMALS, [*words.SHADES, *words.KIND_WORDS], 0.5),
    "plant": chosen(words.PLANTS, [*words.SHADES, *words.KIND_WORDS], 0.5),
    "food": chosen(words.DISHES, words.KIND_WORDS, 0.4),
    "language": named(words.LANGUAGES, 0.3),
    "country": named(words.COUNTRIES, 0.3),
}
