"""Defaults from `config.toml` in PITLANE_HOME: `[defaults]` for every command, `[<command>]` for one.

    [defaults]
    model = "Qwen/Qwen3-0.6B"
    [chat]
    temperature = 0.7

Keys are the long options without dashes in front. What a file cannot say is refused with its path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from pitlane.storage.errors import PitlaneError, StorageError
from pitlane.storage.home import home


def apply_config(name: str, command: click.Command) -> None:
    """Give a command, and each command below it, its defaults from the file."""
    try:
        path = home() / "config.toml"
    except StorageError:  # whatever needs the folder says so; `doctor` and `--help` do not
        return
    config = read_config(path)
    shared, own = _keys(config.get("defaults", {})), _keys(config.get(name, {}))
    unknown = [key for key in own if key not in _options(command)]
    if unknown:
        raise PitlaneError(f"{path}: [{name}] has no option {unknown[0]!r}; see pitlane {name} --help")
    _set_defaults(command, shared | own)


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


def _set_defaults(command: click.Command, values: dict[str, Any]) -> None:
    names = _parameters(command)
    command.context_settings["default_map"] = {names[key]: value for key, value in values.items() if key in names}
    for child in _children(command):
        _set_defaults(child, values)


def _options(command: click.Command) -> set[str]:
    """Options of a command and of those below it."""
    return set(_parameters(command)).union(*(_options(child) for child in _children(command)))


def _parameters(command: click.Command) -> dict[str, str]:
    """Parameter names by option."""
    params = [param for param in command.params if isinstance(param, click.Option) or param.envvar]
    return {_key(text): param.name or "" for param in params for text in param.opts}


def _children(command: click.Command) -> list[click.Command]:
    return list(command.commands.values()) if isinstance(command, click.Group) else []


def _keys(table: dict[str, Any]) -> dict[str, Any]:
    return {_key(key): value for key, value in table.items()}


def _key(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
