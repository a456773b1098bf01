"""Defaults from `config.toml` in PITLANE_HOME: `[defaults]` for every command, `[<command>]` for one.

    [defaults]
    model = "Qwen/Qwen3-0.6B"
    [chat]
    temperature = 0.7

Keys are the long options without dashes in front. What a file cannot say is refused with its path.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pitlane.storage.errors import PitlaneError, StorageError
from pitlane.storage.home import home

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib


def defaults_for(name: str, command: click.Command) -> dict[str, Any]:
    """The `default_map` of a command, with one for each command below it."""
    try:
        path = home() / "config.toml"
    except StorageError:  # whatever needs the folder says so; `doctor` and `--help` do not
        return {}
    config = read_config(path)
    shared, own = _keys(config.get("defaults", {})), _keys(config.get(name, {}))
    unknown = [key for key in own if key not in _options(command)]
    if unknown:
        raise PitlaneError(f"{path}: [{name}] has no option {unknown[0]!r}; see pitlane {name} --help")
    return _defaults(command, shared | own)


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Tables of a configuration file, none if there is no such file."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PitlaneError(f"{path} cannot be read ({error}); correct it or move it away") from None
    for name, table in found.items():
        if not isinstance(table, dict):
            raise PitlaneError(f"{path}: {name} stands outside a table; put it under [defaults]")
    return found


def _options(command: click.Command) -> dict[str, str]:
    """Parameter names of a command and of those below it, by option."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    found = {_key(text): option.name or "" for option in options for text in option.opts}
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        found |= _options(child)
    return found


def _defaults(command: click.Command, values: dict[str, Any]) -> dict[str, Any]:
    by_option = _options(command)
    defaults: dict[str, Any] = {by_option[key]: value for key, value in values.items() if key in by_option}
    for name, child in command.commands.items() if isinstance(command, click.Group) else ():
        defaults[name] = _defaults(child, values)
    return defaults


def _keys(table: dict[str, Any]) -> dict[str, Any]:
    return {_key(key): value for key, value in table.items()}


def _key(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
