"""`config.toml`: its tables, and the line of every key. Knows no command."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitlane.storage.errors import PitlaneError

SHARED = "defaults"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration file; its tables have the keys as they are written."""

    path: Path
    text: str
    tables: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a file; a file that does not exist has no tables."""
        try:
            text = path.read_text(encoding="utf-8-sig")
            tables = tomllib.loads(text)
        except FileNotFoundError:
            return cls(path, "", {})
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise PitlaneError(f"{path} cannot be read ({error}); correct it or move it away") from None
        file = cls(path, text, tables)
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise PitlaneError(f"{file.place(name)}: {name} stands outside a table; put it under [{SHARED}]")
        return file

    def place(self, section: str, key: str | None = None) -> str:
        """The file, and the line on which a section or its key ends: up to this line the text parses and holds it."""
        lines = self.text.splitlines()
        for number in range(1, len(lines) + 1):
            try:
                tables = tomllib.loads("\n".join(lines[:number]))
            except tomllib.TOMLDecodeError:
                continue
            if section in tables and (key is None or key in tables[section]):
                return f"{self.path}, line {number}"
        return str(self.path)

    def keys(self, name: str) -> dict[str, list[tuple[str, str]]]:
        """Places of the options of a command, as (section, key as it is written); the last place counts."""
        places: dict[str, list[tuple[str, str]]] = {}
        for section in (SHARED, name):
            for written in self.tables.get(section, {}):
                places.setdefault(key_of(written), []).append((section, written))
        return places


def key_of(option: str) -> str:
    """An option or a key of the file in the form of a variable: `max_tokens`."""
    return option.lstrip("-").replace("-", "_")
