"""Comparison of two values of the same attribute: values as numbers, and the words for more and less.

Only values of the same unit are compared, so that no answer needs a conversion. Knows nothing of documents.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bundled_model.docqa.words import MONTHS

NUMERIC = frozenset(
    "clock date year money percent count duration age length area weight power energy pressure frequency data dose "
    "temperature speed volume".split()
)
DEGREES = {
    **dict.fromkeys(("clock", "date", "year"), ("later", "earlier")),
    **dict.fromkeys(("money", "percent", "temperature", "speed", "pressure", "frequency"), ("higher", "lower")),
    **dict.fromkeys(("duration", "length"), ("longer", "shorter")),
    **dict.fromkeys(("count", "power", "energy", "data", "dose", "area", "volume", "weight"), ("larger", "smaller")),
    "age": ("higher", "lower"),
}
# Questions that do not need the name of the attribute. Key: that name.
SPECIAL = {
    "price": ("Which costs more, {a} or {b}?", "Which is cheaper, {a} or {b}?"),
    "weight": ("Which is heavier, {a} or {b}?", "Which is lighter, {a} or {b}?"),
    "opening time": ("Which opens later, {a} or {b}?", "Which opens earlier, {a} or {b}?"),
    "closing time": ("Which closes later, {a} or {b}?", "Which closes earlier, {a} or {b}?"),
    "height": ("Which is higher, {a} or {b}?", "Which is less high, {a} or {b}?"),
    "width": ("Which is wider, {a} or {b}?", "Which is narrower, {a} or {b}?"),
    "duration": ("Which takes longer, {a} or {b}?", "Which takes less time, {a} or {b}?"),
    "birth year": ("Who was born later, {a} or {b}?", "Who was born earlier, {a} or {b}?"),
}
GENERAL = ("{w} has the {d} {n}, {a} or {b}?", "{w} of the two has the {d} {n}: {a} or {b}?")


class Measured(NamedTuple):
    """A value as a number and its unit."""

    number: float
    unit: str


def measured(kind: str, value: str) -> Measured | None:
    """Read a value of a kind as a number; return None if its kind has no order."""
    if kind not in NUMERIC:
        return None
    if kind == "clock":
        hour, minute = (int(part) for part in value.split(" ")[0].split(":"))
        if value.endswith("m"):
            hour = hour % 12 + 12 * value.endswith("pm")
        return Measured(hour * 60 + minute, "clock")
    if kind == "date":
        return _day(value)
    number = re.search(r"\d[\d,]*(\.\d+)?", value)
    return None if number is None else Measured(float(number[0].replace(",", "")), value.replace(number[0], "#"))


def _day(value: str) -> Measured:
    month = next((number for number, name in enumerate(MONTHS, 1) if name in value), 0)
    numbers = [int(text) for text in re.findall(r"\d+", value)]
    if not month:
        return Measured(numbers[0] * 400 + numbers[1] * 32 + numbers[2], "day of a year")
    day, *years = numbers
    return Measured((years[0] * 400 if years else 0) + month * 32 + day, "day of a year" if years else "day")
