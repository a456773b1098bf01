"""Values of options from the environment, and from `config.toml` in PITLANE_HOME.

    [defaults]                      # every command that has the option
    model = "Qwen/Qwen3-0.6B"
    [chat]                          # one command
    temperature = 0.7

Keys are the long options without the leading dashes; `PITLANE_MAX_TOKENS` is `--max-tokens`. A value means the same as after a
flag. An error about a value names the variable, or the file and the line.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from pitlane.storage.errors import PitlaneError, StorageError
from pitlane.storage.home import home
from pitlane.ui.commands.config_file import SHARED, ConfigFile, key_of

log = logging.getLogger(__name__)
PREFIX = "PITLANE_"
SETTINGS = tuple(
    PREFIX + name for name in ("HOME", "DEBUG", "LOAD", "CPU_KERNELS", "CACHE_GB")
)  # environment variables without an option
SHORTEST = 3  # characters; a shorter value in a message may be there by chance
MAX_NAMES = 30  # of a list of known words in a message


class Given(NamedTuple):
    """A value from the environment or from the file. place: the variable, or the file and line."""

    param: str
    key: str
    value: str
    place: str

    @property
    def where(self) -> str:
        return self.place if self.place == self.key else f"{self.place}, {self.key}"


Commands = Callable[[], Mapping[str, click.Command]]  # loads all commands, by name


def bind(name: str, command: click.Command, commands: Commands) -> None:
    """Give a command and its subcommands their values from the environment and from the file."""
    _name_variables(command)
    _check_variables(command, commands)
    file = _config_file()
    _check_names(file, name, command, commands)
    _set_defaults(file, name, command)


def given(name: str, command: click.Command) -> list[Given]:
    """Values from the environment, then values from the file."""
    parameters = [pair for member in _family(command) for pair in _parameters(member).items()]
    variables = [(param.name or "", _variable(key) or "") for key, param in parameters]
    values = [Given(param, name, os.environ[name], name) for param, name in variables if name in os.environ]
    file = _config_file()
    for key, param in parameters:
        for section, written in file.keys(name).get(key, ())[-1:]:
            value = file.tables[section][written]
            values.append(Given(param.name or "", written, str(value), file.place(section, written)))
    return values


def explain(error: click.BadParameter, values: Iterable[Given]) -> str | None:
    """The message about a bad value, with the place of the value; None for a value of the command line."""
    if error.ctx is None or error.param is None or error.param.name is None:
        return None
    source = error.ctx.get_parameter_source(error.param.name)
    if source not in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
        return None
    is_variable = source is ParameterSource.ENVIRONMENT
    for value in values:
        if value.param == error.param.name and value.place.startswith(PREFIX) == is_variable:
            return f"{value.where}: {error.message}"
    return None


def places(message: str, values: Iterable[Given]) -> list[str]:
    """Places of the values that a message names."""
    words = set(re.findall(r"\w+", message))
    sentences: dict[str, str] = {}
    for given in values:
        is_named = given.param in words or len(given.value) >= SHORTEST
        if is_named and given.value in message and given.place not in message:
            sentences.setdefault(given.param, f"it is set in {given.where}")
    return list(sentences.values())


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or the known words; for a list that is too long, where it stands."""
    names = sorted(set(known))
    close = get_close_matches(word, names, 1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(names)}" if len(names) <= MAX_NAMES else "`pitlane COMMAND --help` lists the options"


# ---- the environment


def _variable(key: str) -> str | None:
    """The variable of an option; None for `chat --load`: PITLANE_LOAD names plugin packages."""
    name = PREFIX + key.upper()
    return None if name in SETTINGS else name


def _name_variables(command: click.Command) -> None:
    for member in _family(command):
        for key, param in _parameters(member).items():
            param.envvar = param.envvar or _variable(key)


def _check_variables(command: click.Command, commands: Commands) -> None:
    """Warn about PITLANE_ variables that nothing reads."""
    settings = {name.removeprefix(PREFIX) for name in SETTINGS}
    given = {name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX)}
    unknown = given - settings - {key.upper() for key in _options(command)}
    known = settings | {key.upper() for other in commands().values() for key in _options(other)} if unknown else set()
    for name in sorted(unknown - known):
        close = get_close_matches(name, sorted(known), 1)
        words = f"; did you mean {PREFIX}{close[0]}?" if close else ""
        log.warning("%s%s is set, but nothing reads it%s", PREFIX, name, words)


# ---- the file


def _config_file() -> ConfigFile:
    try:
        return ConfigFile.read(home() / "config.toml")
    except StorageError:  # a command that needs the folder raises it; `doctor` and `--help` work without
        return ConfigFile(Path(), "", {})


def _check_names(file: ConfigFile, name: str, command: click.Command, commands: Commands) -> None:
    """Refuse a section that is not a command, and a key that is not an option."""
    for section in file.tables:
        if section not in (SHARED, name) and section not in commands():
            words = suggestion(section, [SHARED, *commands()])
            raise PitlaneError(f"{file.place(section)}: there is no command {section!r}; {words}")
    for key, places in file.keys(name).items():
        for section, written in places:
            known = _options(command)
            if key not in known and section == SHARED:
                known = {option for other in commands().values() for option in _options(other)}
            if key not in known:
                words = suggestion(key.replace("_", "-"), (option.replace("_", "-") for option in known))
                raise PitlaneError(f"{file.place(section, written)}: [{section}] has no option {written!r}; {words}")


def _set_defaults(file: ConfigFile, name: str, command: click.Command) -> None:
    keys = file.keys(name)
    for member in _family(command):
        values = member.context_settings["default_map"] = {}
        for key, param in _parameters(member).items():
            for section, written in keys.get(key, ())[-1:]:
                value = file.tables[section][written]
                try:
                    values[param.name or ""] = _as_typed(param, value)
                except ValueError as error:
                    raise PitlaneError(f"{file.place(section, written)}, {written}: {error}") from None


def _as_typed(param: click.Parameter, value: Any) -> Any:
    """The value as if it had been typed: a text, a bool for a flag, a list for a repeatable option."""
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if getattr(param, "multiple", False):
        return [_text(part) for part in (value if isinstance(value, list) else [value])]
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is neither a text nor a number")
    return str(value)


# ---- options of a command


def _options(command: click.Command) -> set[str]:
    """Options of a command and of its subcommands."""
    return {key for member in _family(command) for key in _parameters(member)}


def _parameters(command: click.Command) -> dict[str, click.Parameter]:
    """Parameters by long option, in the form of a variable: `max_tokens`."""
    params = [param for param in command.params if isinstance(param, click.Option) or param.envvar]
    return {key_of(text): param for param in params for text in param.opts if len(key_of(text)) > 1}


def _family(command: click.Command) -> Iterator[click.Command]:
    """A command and its subcommands."""
    yield command
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        yield from _family(child)
