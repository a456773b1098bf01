"""The engine's one thread: it runs what others post, and steps while there is work."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from pitlane.engine.errors import EngineClosed

log = logging.getLogger("pitlane")
OMP_PAUSE_SOFT = 1


FORKED = "this engine was made in another process, and its thread did not come along; make a new engine in this one"


class Worker:
    """Runs posted functions and steps on one thread. The engine is not among what it holds, so the engine can be collected."""

    def __init__(self) -> None:
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._process = os.getpid()
        self.closed = False
        self._thread: threading.Thread | None = None

    def start(self, ready: Callable[[], bool], step: Callable[[], None], finish: Callable[[], None]) -> None:
        """Start the thread. ready: whether a step has work. step: runs one step and never raises. finish: the last call."""
        self._thread = threading.Thread(
            target=self._run, args=(ready, step, finish), name="pitlane-engine", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)  # the interpreter must not end while a thread is inside torch

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked process: its thread does not exist there, and its locks may be held for ever."""
        return self._process != os.getpid()

    def check(self) -> None:
        """Raise EngineClosed if nothing can be posted any more."""
        if self.is_forked:
            raise EngineClosed(FORKED)
        if self.closed:
            raise EngineClosed("the engine is closed; make a new one")

    def post(self, action: Callable[[], None]) -> bool:
        """Have the thread run `action` before its next step; False, and nothing happens, if the worker is closed."""
        if self.is_forked:
            return False
        with self._wake:
            if self.closed:
                return False
            self._inbox.append(action)
            self._wake.notify()
            return True

    def call(self, action: Callable[[], None]) -> Future[None]:
        """Post an action; the future says when it is done. Do not wait for it under a lock that the thread may take.

        On the thread itself the action runs at once.
        """
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if threading.current_thread() is self._thread:
            run()
        elif not self.post(run):
            self.check()
        return done

    def stop(self) -> None:
        """Have the thread end after its current step, and wait for nothing."""
        if not self.is_forked:
            with self._wake:
                self.closed = True
                self._wake.notify()

    def close(self) -> None:
        """Have the thread end after its current step, and wait for that."""
        self.stop()
        if not self.is_forked and self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _run(self, ready: Callable[[], bool], step: Callable[[], None], finish: Callable[[], None]) -> None:
        while not self.closed:
            with self._wake:
                while not (self._inbox or self.closed or ready()):
                    self._wake.wait()
            self._do_posted()
            if not self.closed and ready():
                step()
        self._do_posted()  # requests that were just submitted end too
        self._do(finish)
        atexit.unregister(self.close)

    def _do_posted(self) -> None:
        with self._wake:
            actions, self._inbox = self._inbox, []
        for action in actions:
            self._do(action)

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            log.exception("a function that was posted to the engine's thread failed")


def release_threads() -> None:
    """Give back the OpenMP threads that torch made for the calling thread; its next parallel operation makes them again.

    While there are more such threads than cores, GNU OpenMP puts all of them to sleep between any two operations, also those of the
    engine, and waking a thread takes longer than a small operation: llama-1b's products took 1.15 to 1.28 times as long. So a
    thread that loads a model gives its OpenMP threads back.
    """
    with suppress(AttributeError, OSError, TypeError):  # another OpenMP, or none
        ctypes.CDLL(None).omp_pause_resource_all(OMP_PAUSE_SOFT)
