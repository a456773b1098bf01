"""JSON schemas of growing kind, drawn by a seed. Every schema bounds its values, so that any answer ends."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "age", "city", "tags", "price", "colour", "size", "active", "kind", "note"]
LEVELS = range(1, 11)


def schema(level: int, seed: int) -> dict[str, Any]:
    """An object with `level` kinds of values to choose from. Level 1: integers alone; level 10: nested objects and references."""
    generator = random.Random(f"{level} {seed}")
    result = _object(generator, level, depth=1 + level // 4)
    if level == LEVELS[-1]:
        result["$defs"] = {"point": {"type": "array", "items": _integer(generator), "minItems": 2, "maxItems": 2}}
        result["properties"]["place"] = {"$ref": "#/$defs/point"}
        result["required"].append("place")
    return result


def _object(generator: random.Random, level: int, depth: int) -> dict[str, Any]:
    names = generator.sample(WORDS, generator.randint(1, 2 + level // 5))
    properties = {name: _value(generator, level, depth) for name in names}
    required = [name for name in names if level < 7 or generator.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(generator: random.Random, level: int, depth: int) -> dict[str, Any]:
    kinds = [_integer, _boolean, _enum, _text, _pattern, _array, _optional, _constant, _either][:level]
    if depth > 1 and generator.random() < 0.4:
        return _object(generator, level, depth - 1)
    return generator.choice(kinds)(generator)


def _integer(generator: random.Random) -> dict[str, Any]:
    low = generator.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + generator.randint(0, 2000)}


def _boolean(generator: random.Random) -> dict[str, Any]:
    return {"type": "boolean"}


def _enum(generator: random.Random) -> dict[str, Any]:
    return {"enum": generator.sample([*WORDS, 1, 2.5, None, True], generator.randint(1, 5))}


def _text(generator: random.Random) -> dict[str, Any]:
    low = generator.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + generator.randint(0, 8)}


def _pattern(generator: random.Random) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": generator.choice(["^[A-Z][a-z]{1,6}$", "^[0-9]{4}-[0-9]{2}$", "^(ab|c){1,4}$"]),
    }


def _array(generator: random.Random) -> dict[str, Any]:
    low = generator.randint(0, 2)
    return {"type": "array", "items": _integer(generator), "minItems": low, "maxItems": low + generator.randint(0, 2)}


def _optional(generator: random.Random) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": 0, "maximum": 9}


def _constant(generator: random.Random) -> dict[str, Any]:
    return {"const": generator.choice([*WORDS, 7, False])}


def _either(generator: random.Random) -> dict[str, Any]:
    return {"anyOf": [_integer(generator), _text(generator)]}
