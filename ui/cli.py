"""The command line: `pitlane COMMAND`. Only the module of the chosen command is imported.

Every error that a user can cause is one line on standard error and exit code 2; PITLANE_DEBUG=1 shows the traceback. The value of
an option comes from the flag, else from the environment (PITLANE_<OPTION>), else from `config.toml` in PITLANE_HOME, else it is the
default. Other packages add commands through entry points of the group `pitlane.commands`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from pitlane.storage.errors import PitlaneError, reason_of
from pitlane.ui.commands.config import Given, bind, explain, given, places, suggestion
from pitlane.ui.render import say
from pitlane.ui.streams import close_output, open_streams

COMMANDS = {
    "run": "Answer one prompt, over documents if given.",
    "chat": "Talk in the terminal, over documents, with plugins toggled between turns.",
    "ui": "Open the page in a browser.",
    "compare": "One prompt under several plans, side by side.",
    "docs": "Documents and their saved KV.",
    "models": "Models on this machine: list, fetch, remove.",
    "plugins": "Plugins and their options.",
    "memory": "What a model needs in memory, without loading it.",
    "quantize": "Write a model with smaller weights, for Pitlane and other programs.",
    "train": "Train a small model on texts and chats.",
    "distill": "Teach a small model to draft for a large one.",
    "eval": "Bytes, speed and quality of quantization methods.",
    "bench": "Measure speed on this machine, with --vs also in transformers.",
    "doctor": "Check this installation and this machine.",
}
ENTRY_POINTS = "pitlane.commands"
INTERRUPTED = 130
MAX_ERROR = 900  # characters


class LazyGroup(click.Group):
    """Imports a command when it is called; turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(point.name for point in _foreign() if point.name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = _load(cmd_name)
        if command is not None:
            bind(cmd_name, command, _all_commands)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but suggests commands for an unknown name without importing them."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}; {suggestion(args[0], known)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, but an error about a value of the environment or of config.toml names the place of the value."""
        try:
            return super().invoke(ctx)
        except click.BadParameter as error:
            message = explain(error, _values(ctx))
            if message is None:
                raise
            raise click.UsageError(message, error.ctx) from error
        except PitlaneError as error:
            for place in places(str(error), _values(ctx)):
                error.add_note(place)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = list(COMMANDS.items())
        rows += [(point.name, f"From {_package(point)}.") for point in _foreign() if point.name not in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but prints an error as one line; with PITLANE_DEBUG=1 raises it."""
        name = prog_name or "pitlane"
        if not standalone_mode or os.environ.get("PITLANE_DEBUG", "0") not in ("", "0"):
            return super().main(args, name, complete_var, standalone_mode, **extra)
        _log_in_lines()
        open_streams()
        try:
            code = super().main(args, name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # since click 8.2; older versions print help
                error.show()
                sys.exit(2)
            _fail(error.format_message() + _help_hint(error))
        except OSError as error:  # about a file, or about standard output, which has no filename
            where = f"cannot use {error.filename}" if error.filename else "cannot write the output"
            _fail(f"{where}: {reason_of(error)}")
        except PitlaneError as error:
            _fail("; ".join([str(error), *getattr(error, "__notes__", ())]))
        sys.exit(code if isinstance(code, int) else 0)


class _OneLine(logging.Handler):
    """Warnings of the engine and of plugins, without tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        say("pitlane: " + " ".join(record.getMessage().split()), err=True)


def _log_in_lines() -> None:
    log = logging.getLogger("pitlane")
    if not any(isinstance(handler, _OneLine) for handler in log.handlers):
        log.addHandler(_OneLine(logging.WARNING))


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    if len(line) > MAX_ERROR:  # it may hold a value of any length; its end says what to do
        line = f"{line[: MAX_ERROR // 2]} … {line[-MAX_ERROR // 2 :]}"
    say(f"pitlane: {line}", err=True)
    close_output()
    sys.exit(2)


def _help_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see {context.command_path} --help)" if context else ""


def _load(name: str) -> click.Command | None:
    if name in COMMANDS:
        module = importlib.import_module(f"pitlane.ui.commands.{name}")
        command = getattr(module, name, None) or getattr(module, f"{name}_")
    else:
        point = next((point for point in _foreign() if point.name == name), None)
        if point is None:
            return None
        try:
            command = point.load()
        except Exception as error:
            raise click.ClickException(f"command {name} of {_package(point)} did not load: {error}") from error
    assert isinstance(command, click.Command), f"{name} is not a click command"
    return command


def _values(ctx: click.Context) -> list[Given]:
    """Values from the environment and from config.toml for the command of a call; none if they cannot be read."""
    name = ctx.invoked_subcommand
    command = _load(name) if name else None
    try:
        return given(name, command) if name and command else []
    except PitlaneError:  # the caller raises this error already
        return []


def _all_commands() -> dict[str, click.Command]:
    """All commands that load, by name."""
    commands: dict[str, click.Command] = {}
    for name in [*COMMANDS, *(point.name for point in _foreign())]:
        with suppress(click.ClickException):
            command = _load(name)
            if command is not None:
                commands[name] = command
    return commands


def _foreign() -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _package(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Any option can be set as PITLANE_<OPTION>, or under [defaults] in config.toml of PITLANE_HOME.",
)
@click.version_option(package_name="pitlane", prog_name="pitlane")
def main() -> None:
    """Run language models with optimisations that are plugins: swap them, and read what each plugin saved."""
