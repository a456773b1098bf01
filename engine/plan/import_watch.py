"""Watches the import of a plugin: restores the global settings of the process, and notes side effects of the import.

An import runs code of other authors. Its output goes to standard error, because standard output may be the JSON of a command.
Threads cannot be stopped and an import cannot be interrupted, so they are only noted. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from time import perf_counter
from types import ModuleType
from typing import Any, NamedTuple

log = logging.getLogger("pitlane")
SLOW_SECONDS = 5.0  # a longer import gets a note, and while it lasts a warning names the plugin
_WATCHING = threading.RLock()  # standard output and the settings belong to the whole process


class Setting(NamedTuple):
    """A global setting of the process. default: its value in a process that has not imported torch."""

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    default: Callable[[Any], Any] = lambda torch: None


SETTINGS = (  # the first argument of every function is the module torch
    Setting(
        "torch's default dtype",
        lambda torch: torch.get_default_dtype(),
        lambda torch, value: torch.set_default_dtype(value),
        lambda torch: torch.float32,
    ),
    Setting(
        "torch's default device",
        lambda torch: torch.get_default_device().type,
        lambda torch, value: torch.set_default_device(None if value == "cpu" else value),
        lambda torch: "cpu",
    ),
    Setting(
        "torch's recording of gradients",
        lambda torch: torch.is_grad_enabled(),
        lambda torch, value: torch.set_grad_enabled(value),
        lambda torch: True,
    ),
    Setting(
        "torch's number of threads",
        lambda torch: torch.get_num_threads(),
        lambda torch, value: torch.set_num_threads(value),
    ),
)


@contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Put the global settings back at the end. The list then has a line for every setting that had changed."""
    notes: list[str] = []
    folder, torch = _folder(), _torch()
    before = {setting.name: setting.read(torch) for setting in SETTINGS} if torch else {}
    try:
        yield notes
    finally:
        if folder and _folder() != folder:
            note = f"changed the working directory to {_folder()}; "
            try:
                os.chdir(folder)
                notes.append(note + "it was put back")
            except OSError as error:
                notes.append(note + f"it cannot be put back: {error.strerror}")
        torch = _torch()
        for setting in SETTINGS if torch else ():
            expected = before[setting.name] if before else setting.default(torch)
            value = setting.read(torch)
            if expected is not None and value != expected:
                setting.write(torch, expected)
                notes.append(f"changed {setting.name} to {value}; it was put back")


@contextmanager
def watched(name: str, source: str) -> Iterator[list[str]]:
    """Watch the import of a plugin. At the end, the list has a line for every side effect."""
    notes: list[str] = []
    threads, started = set(threading.enumerate()), perf_counter()
    alarm = threading.Timer(SLOW_SECONDS, _warn, (name, source))
    alarm.daemon = True
    alarm.start()
    try:
        with _WATCHING, settings_kept() as changes, redirect_stdout(sys.stderr):
            yield notes
    finally:
        alarm.cancel()
        seconds = perf_counter() - started
        if seconds > SLOW_SECONDS:
            notes.append(f"took {seconds:.0f} s; do slow work in lane_opened")
        known = {*threads, alarm}
        own = [thread.name for thread in threading.enumerate() if thread not in known and not _is_ours(thread)]
        if own:
            notes.append(f"started threads ({', '.join(own)}); start them in lane_opened, and end them in close()")
        notes += changes


def _is_ours(thread: threading.Thread) -> bool:
    """Whether an engine of this process started a thread during the import."""
    return thread.name.startswith("pitlane")


def _folder() -> str:
    """The working directory; empty if it no longer exists."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _torch() -> ModuleType | None:
    """The module torch, if its import has ended."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "set_default_device") and hasattr(torch, "get_num_threads") else None


def _warn(name: str, source: str) -> None:
    log.warning(
        "the import of plugin %s (%s) takes more than %.0f s; if it never ends, stop Pitlane and type: "
        "pitlane plugins disable %s",
        name,
        source,
        SLOW_SECONDS,
        name,
    )
