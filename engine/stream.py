"""The events of one request. The engine's thread writes them; the caller reads them, in plain or in async code.

Iterating yields `PrefillProgress`, `TextDelta` and at last `Finished`. An error of the request is raised. The request ends before
the engine's next step if the caller leaves the loop early, calls `abort()` or drops the stream. A request with several samples
yields one `Finished`, after all samples have ended.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from pitlane.engine.errors import EngineClosed
from pitlane.engine.events import Event, Finished, Result
from pitlane.engine.worker import FORKED


class Stream:
    """Events of one request. One thread or task may read while the engine's thread writes.

    on_abort: called by `abort` before the end. on_read: called when an iteration begins; `result` does not call it.
    """

    def __init__(
        self, on_abort: Callable[[], object], on_read: Callable[[], object] = lambda: None, num_samples: int = 1
    ) -> None:
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._on_abort, self._on_read = on_abort, on_read
        self._num_samples = num_samples
        self._process = os.getpid()
        self._finished: dict[int, Result] = {}  # by sample
        self._end: Finished | Exception | None = None
        self._has_end = threading.Event()  # set when `_events` holds the end
        self._wants_end_alone = False
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, event: Event | Exception) -> None:
        """Add an event. The engine's thread calls this."""
        if isinstance(event, Finished) and self._num_samples > 1:
            self._finished[event.sample] = event.result
            if len(self._finished) < self._num_samples:
                return
            samples = tuple(self._finished[number] for number in range(self._num_samples))
            event = Finished(replace(samples[0], samples=samples))
        is_end = isinstance(event, (Finished, Exception))
        if self._wants_end_alone and not is_end:
            return
        self._events.put(event)
        if is_end:
            self._has_end.set()
        with self._lock:
            if self._waiter is not None:
                loop, ready = self._waiter
                with suppress(RuntimeError):  # the event loop is closed, so no reader waits
                    loop.call_soon_threadsafe(ready.set)

    def abort(self) -> None:
        """End the request before the next step. The text so far arrives as a result with finish_reason `aborted`."""
        if self._end is None:
            self._on_abort()

    def result(self) -> Result:
        """Read to the end. Return the result, or raise the error. A second call returns or raises the same object.

        Drops all events but the end: to wake the caller for every token would cost the engine's thread time.
        """
        if self._end is None:
            self._check_process()
            self._wants_end_alone = True
            try:
                self._has_end.wait()
            finally:
                self._wants_end_alone = False
        while self._end is None:
            self._next()
        if isinstance(self._end, Exception):
            raise self._end
        return self._end.result

    @property
    def is_empty(self) -> bool:
        """Whether no event is ready: the next read waits for the engine."""
        return self._events.empty()

    def __iter__(self) -> Iterator[Event]:
        self._on_read()
        try:
            while self._end is None:
                yield self._next()
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncIterator[Event]:
        self._on_read()
        ready = asyncio.Event()
        with self._lock:
            self._waiter = (asyncio.get_running_loop(), ready)
        try:
            while self._end is None:
                self._check_process()
                if self._events.empty():
                    await ready.wait()
                ready.clear()
                while self._end is None and not self._events.empty():
                    yield self._next()
        finally:
            with self._lock:
                self._waiter = None
            self.abort()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def __del__(self) -> None:
        self.abort()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise EngineClosed(FORKED)

    def _next(self) -> Event:
        self._check_process()
        event = self._events.get()
        if isinstance(event, (Finished, Exception)):
            self._end = event
        if isinstance(event, Exception):
            raise event
        return event
