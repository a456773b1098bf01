"""Open sets of values for the document generator: names, codes, numbers, dates, amounts.

Every function draws one value from a `random.Random`. The sets are open on purpose: a model that sees a value once in a
document cannot have remembered it, so it has to copy it. Knows nothing of documents, questions or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

FIRST_NAMES = (
    "Anna Ben Clara David Elena Felix Grace Hugo Ines Jonas Kate Leo Maria Nora Oscar Paula Quentin Rosa Samuel Tessa "
    "Ulrich Vera Walter Yara Adam Bella Cyril Dora Emil Fiona Gustav Hanna Ivan Julia Karl Laura Martin Nina Otto Priya "
    "Rahim Sofia Tom Ursula Victor Wendy Aisha Bruno Chen Diego Edith Farid Greta Henry Irene Jack Lena Mateo Noah Olga"
).split()
LAST_NAMES = (
    "Harris Miller Novak Silva Becker Moreau Rossi Keller Larsen Okafor Tanaka Walsh Bright Carter Dalton Fisher Grant "
    "Hughes Irving Jensen Khan Lopez Marsh Nolan Ortega Parker Quinn Reed Sato Turner Underwood Vogel Weber Young Ziegler "
    "Abbott Barnes Cole Drake Ellis Frost Gomez Hall Price Stone Wood Baker Cook Hill West King Bell Fox Wolf Lane"
).split()
SYLLABLES = (
    "ar bel cor dan el fen gar hal is jor kel lun mar nor ol pen ras sil tor ul ver wen yor zan bra cle dri fro gle kri "
    "pla sti tre vin mor ber lan ton ric mond wick ley der ham ford ster ro li na ka mi so ta re do pe"
).split()
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = (
    "a baker,a surveyor,a marine biologist,a bridge engineer,a violin maker,a nurse,a tax adviser,a school teacher,"
    "a pilot,a stage designer,a chemist,a gardener,a translator,an architect,a mechanic,a librarian,a photographer,"
    "a data analyst,a judge,a glass blower,a watchmaker,a geologist,a chef,a vet,a carpenter,a radio host"
).split(",")
SUBJECTS = (
    "physics,law,history,botany,music,economics,medicine,geography,philosophy,chemistry,fine arts,computer science,"
    "mathematics,linguistics,astronomy,civil engineering,theology,marine ecology,statistics,graphic design"
).split(",")
COLOURS = (
    "dark red,light blue,white,black,silver,forest green,orange,yellow,grey,navy blue,ivory,copper,violet,turquoise,"
    "sand,brown,pink,gold"
).split(",")
MATERIALS = (
    "oak,steel,brass,aluminium,glass,cotton,wool,leather,granite,bamboo,carbon fibre,copper,ceramic,birch,rubber,linen,"
    "stainless steel,cork,marble,nylon"
).split(",")


def invented(rng: Random) -> str:
    """Return a capitalised word of two or three syllables that is in no list."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 2, 3)))).capitalize()


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.8 else invented(rng)


def last_name(rng: Random) -> str:
    return rng.choice(LAST_NAMES) if rng.random() < 0.4 else invented(rng)


def person(rng: Random) -> str:
    title = "Dr " if rng.random() < 0.08 else ""
    return f"{title}{first_name(rng)} {last_name(rng)}"


def place(rng: Random) -> str:
    return rng.choice(("", "", "", "Port ", "North ", "Lower ", "Saint ", "Upper ")) + invented(rng)


def company(rng: Random) -> str:
    return f"{last_name(rng)} {rng.choice(('Ltd', 'and Sons', 'Group', 'Works', 'Trading', 'Labs', 'Press', 'Motors'))}"


def room(rng: Random) -> str:
    forms = (
        f"room {rng.randint(1, 499)}",
        f"hall {rng.choice('ABCDEFGH')}",
        f"the {invented(rng)} room",
        f"building {rng.randint(1, 40)}",
        f"the {rng.choice(('blue', 'green', 'upper', 'east', 'old', 'glass', 'west'))} hall",
    )
    return rng.choice(forms)


def address(rng: Random) -> str:
    street = rng.choice(("Street", "Road", "Lane", "Square", "Avenue", "Way"))
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
    year = f" {rng.randint(1985, 2032)}" if rng.random() < 0.5 else ""
    return f"{day} {month}{year}" if rng.random() < 0.75 else f"{month} {day}"


def year(rng: Random) -> str:
    return str(rng.randint(1890, 2029))


def weekday(rng: Random) -> str:
    if rng.random() < 0.3:
        first = rng.randrange(5)
        return f"{WEEKDAYS[first]} to {WEEKDAYS[rng.randint(first + 1, 6)]}"
    return rng.choice(WEEKDAYS) + rng.choice(("", "s"))


def money(rng: Random) -> str:
    amount = rng.choice((rng.randint(1, 99), rng.randint(100, 999), rng.randint(1000, 98000)))
    cents = f".{rng.randint(0, 99):02d}" if rng.random() < 0.45 else ""
    digits = f"{amount:,}" if rng.random() < 0.5 else str(amount)
    return rng.choice(("${}", "£{}", "EUR {}", "{} euros", "€{}", "{} dollars", "CHF {}")).format(digits + cents)


def percent(rng: Random) -> str:
    return f"{rng.randint(1, 99)}{rng.choice(('%', ' percent', '%'))}"


def code(rng: Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
    digits = "".join(rng.choices("0123456789", k=rng.randint(2, 5)))
    return rng.choice(
        (f"{letters}-{digits}", f"{letters}{digits}", digits + rng.choice("0123456789"), f"{digits}/{letters}")
    )


def phone(rng: Random) -> str:
    return f"0{rng.randint(10, 999)} {rng.randint(100, 999)} {rng.randint(10, 9999)}"


def email(rng: Random) -> str:
    user = rng.choice(("info", "office", "help", "desk", "team", "booking", last_name(rng).lower()))
    return f"{user}@{invented(rng).lower()}.{rng.choice(('org', 'com', 'example', 'net'))}"


def count(rng: Random) -> str:
    return str(rng.choice((rng.randint(2, 30), rng.randint(2, 400))))


def measure(*units: str) -> Callable[[Random], str]:
    """Return a maker of numbers that carry one of the given units."""

    def draw(rng: Random) -> str:
        number = rng.choice(
            (str(rng.randint(2, 99)), f"{rng.randint(100, 2400)}", f"{rng.randint(1, 90)}.{rng.randint(1, 9)}")
        )
        return f"{number} {rng.choice(units)}"

    return draw


def chosen(options: list[str]) -> Callable[[Random], str]:
    """Return a maker that picks one of a closed list."""
    return lambda rng: rng.choice(options)


VALUES: dict[str, Callable[[Random], str]] = {
    "person": person,
    "place": place,
    "company": company,
    "room": room,
    "address": address,
    "clock": clock,
    "hours": hours,
    "date": date,
    "year": year,
    "weekday": weekday,
    "money": money,
    "percent": percent,
    "code": code,
    "phone": phone,
    "email": email,
    "count": count,
    "duration": lambda rng: f"{rng.randint(2, 60)} {rng.choice(('minutes', 'hours', 'days', 'weeks', 'months'))}",
    "age": lambda rng: f"{rng.randint(3, 70)} years",
    "length": measure("m", "cm", "mm", "km", "metres"),
    "weight": measure("kg", "g", "tonnes"),
    "power": measure("watts", "kW", "volts", "amps"),
    "temperature": measure("degrees", "°C"),
    "speed": measure("km/h", "mph"),
    "volume": measure("litres", "ml"),
    "job": chosen(JOBS),
    "subject": chosen(SUBJECTS),
    "colour": chosen(COLOURS),
    "material": chosen(MATERIALS),
}
