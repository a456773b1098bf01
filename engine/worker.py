"""The engine's thread. It runs the functions that other threads post, and runs steps while there is work."""

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
FORKED = "this engine was made in another process and has no thread in this process; make a new engine here"


class Worker:
    """Runs posted functions and steps on one thread. It holds no reference to the engine, so the engine can be collected."""

    def __init__(self) -> None:
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._process = os.getpid()
        self.closed = False
        self._thread: threading.Thread | None = None

    def start(self, ready: Callable[[], object], step: Callable[[], None], finish: Callable[[], None]) -> None:
        """Start the thread. ready: its result is true if there is work. step: runs a step, never raises. finish: called last."""
        self._thread = threading.Thread(
            target=self._run, args=(ready, step, finish), name="pitlane-engine", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)  # the interpreter must not end while a thread is inside torch

    @property
    def is_forked(self) -> bool:
        """Whether this worker is a copy in a forked process. The copy has no thread, and its locks may be held for ever."""
        return self._process != os.getpid()

    def check(self) -> None:
        """Raise EngineClosed if the worker takes no more functions."""
        if self.is_forked:
            raise EngineClosed(FORKED)
        if self.closed:
            raise EngineClosed("the engine is closed; make a new one")

    def post(self, action: Callable[[], None]) -> bool:
        """Run `action` on the thread before its next step. Returns False and does nothing if the worker is closed or forked."""
        if self.is_forked:
            return False
        with self._wake:
            if self.closed:
                return False
            self._inbox.append(action)
            self._wake.notify()
            return True

    def call(self, action: Callable[[], None]) -> Future[None]:
        """Run an action on the thread. Returns a future that ends with the action. Raises EngineClosed.

        On the thread itself the action runs at once. Do not wait for the future while you hold a lock that the thread may take.
        """
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except (Exception, SystemExit) as error:  # a part of a plugin may call sys.exit()
                done.set_exception(error)
            else:
                done.set_result(None)

        if threading.current_thread() is self._thread:
            run()
        elif not self.post(run):
            self.check()
        return done

    def stop(self) -> None:
        """Tell the thread to end after its current step. Do not wait for it."""
        if not self.is_forked:
            with self._wake:
                self.closed = True
                self._wake.notify()

    def close(self) -> None:
        """Tell the thread to end after its current step, and wait for its end."""
        self.stop()
        if not self.is_forked and self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _run(self, ready: Callable[[], object], step: Callable[[], None], finish: Callable[[], None]) -> None:
        try:
            while not self.closed:
                with self._wake:
                    while not (self._inbox or self.closed or ready()):
                        self._wake.wait()
                self._do_posted()
                if not self.closed and ready():
                    step()
        finally:  # after an unexpected error too: `finish` ends the requests, so no reader waits for ever
            self.stop()
            self._do_posted()  # the last submitted requests enter the loop, so that `finish` ends them
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
        except (Exception, SystemExit):
            log.exception("a function that was posted to the engine's thread failed")


def release_threads() -> None:
    """Give back the OpenMP threads that torch made for the calling thread. Its next parallel operation makes new threads.

    If there are more OpenMP threads than cores, GNU OpenMP lets all of them sleep between two operations, also the threads of the
    engine. To wake a thread takes longer than a small operation: the products of llama-1b took 1.15 to 1.28 times as long. So a
    thread that has loaded a model gives its OpenMP threads back.
    """
    with suppress(AttributeError, OSError, TypeError):  # another OpenMP, or none
        ctypes.CDLL(None).omp_pause_resource_all(OMP_PAUSE_SOFT)
