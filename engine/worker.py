"""The engine's one thread: it runs what others post, and steps while there is work."""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from pitlane.engine.errors import EngineClosed

log = logging.getLogger("pitlane")
OMP_PAUSE_SOFT = 1


class Worker:
    """`ready` says whether a step would do something; `step` does it and does not raise."""

    def __init__(self, ready: Callable[[], bool], step: Callable[[], None]) -> None:
        self._ready = ready
        self._step = step
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self.closed = False

    def post(self, action: Callable[[], None]) -> bool:
        """Have the thread do something before its next step; False (and nothing happens) once it is closed."""
        with self._wake:
            if self.closed:
                return False
            self._inbox.append(action)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pitlane-engine", daemon=True)
                self._thread.start()
                atexit.register(self.close)  # a thread inside torch when the interpreter ends would abort it
            self._wake.notify()
            return True

    def call(self, action: Callable[[], None]) -> Future[None]:
        """`post`, with a future that says when it is done. Do not wait for it under a lock that the thread may want.

        On the thread itself the action is done at once.
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
            raise EngineClosed("the engine is closed; make a new one")
        return done

    def close(self) -> list[Callable[[], None]]:
        """Stop the thread after its current step; what was posted and not done."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self.close)
        rest, self._inbox = self._inbox, []
        return rest

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.closed or self._ready()):
                    self._wake.wait()
                if self.closed:
                    return
                actions, self._inbox = self._inbox, []
            for action in actions:
                try:
                    action()
                except Exception:
                    log.exception("the engine's thread failed in what was posted to it")
            if self._ready():
                self._step()


def release_threads() -> None:
    """Give back the OpenMP threads that torch made for the calling thread; its next parallel operation makes them again.

    While there are more of them than cores, GNU OpenMP has them sleep between any two operations, the engine's too, and waking one
    takes longer than a small operation: llama-1b's products took 1.15 to 1.28 times as long. So whoever loads gives them back.
    """
    with suppress(AttributeError, OSError, TypeError):  # another OpenMP, or none
        ctypes.CDLL(None).omp_pause_resource_all(OMP_PAUSE_SOFT)
