"""The model of the server, and its change to another model while the server runs.

A change runs on a thread of its own: fetch, load, wait for the running answers, exchange the page. The old model answers until
then. If both models do not fit into memory at once, the old model is closed before the new model is loaded; if the load then fails,
the old model is loaded again. Knows no Gradio and no HTML: the page that is served is a `Front`.
"""

from __future__ import annotations

import gc
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

from pitlane import ModelError, trim_heap
from pitlane.storage.errors import PitlaneError
from pitlane.ui.render import short_name, size
from pitlane.ui.session import EngineOptions

if TYPE_CHECKING:
    from pitlane import Engine
    from pitlane.models import MemoryEstimate

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05
CLOSE_SECONDS = 10.0  # the longest wait for a change at the end of the process


class Front(Protocol):
    """The page that is served."""

    def retire(self) -> bool:
        """Accept no more questions, and return True; return False if an answer is running."""
        ...

    def reopen(self) -> None:
        """Accept questions again."""
        ...

    def frame(self, key: str, tab: str, number: int) -> dict[str, Any]:
        """Return the frame of an unfinished answer behind frame `number` of a tab."""
        ...


class _Cancelled(Exception):
    """The user cancelled the change."""


@dataclass(slots=True)
class Change:
    """A change of the model. phase: fetching, decoding, loading, waiting, failed. done, total: bytes; total is 0 until it is known.

    is_alone: the old model is closed, so nothing answers.
    """

    name: str
    phase: str = "fetching"
    done: int = 0
    total: int = 0
    is_alone: bool = False
    reason: str = ""
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    cancelled: Event = field(default_factory=Event)

    @property
    def is_over(self) -> bool:
        return self.phase == "failed"

    @property
    def share(self) -> float | None:
        """The share that is fetched or decoded; None if it is not known."""
        return self.done / self.total if self.phase in ("fetching", "decoding") and self.total else None

    @property
    def brief(self) -> str:
        """The state in a word, for a narrow screen."""
        if self.cancelled.is_set():
            return "cancelling"
        return f"{self.share:.0%}" if self.share is not None else self.phase

    @property
    def text(self) -> str:
        """The state as a line with the bytes and seconds so far."""
        words = {"loading": "loading", "waiting": "waits for the running answer"}.get(self.phase, "connecting")
        if self.share is not None:
            words = f"{size(self.done)} of {size(self.total)}" if self.done < self.total else "preparing"
            words = f"decoding, {words}" if self.phase == "decoding" else words
        if self.cancelled.is_set():
            words = "cancelling"
        alone = "; nothing answers meanwhile" if self.is_alone else ""
        return f"{short_name(self.name)}: {words}, {time.monotonic() - self.started:.0f} s{alone}"

    def advance(self, done: int, total: int) -> None:
        """Take the progress of a fetch. Ends the fetch if the user has cancelled it."""
        self.done, self.total = done, total
        self.check()

    def decode(self, done: int, total: int) -> None:
        """Take the progress of decoding a GGUF file, as `advance` does for a fetch."""
        self.phase = "decoding"
        self.advance(done, total)

    def check(self) -> None:
        if self.cancelled.is_set():
            raise _Cancelled


class ModelSwitch:
    """Holds the engine of the server. Close it at the end: it ends a running change and closes the engine.

    exchange: builds the page over an engine and serves it in place of the page before. None: the model stays.
    """

    def __init__(
        self, options: EngineOptions, engine: Engine, exchange: Callable[[Engine], None] | None = None
    ) -> None:
        self.options, self.engine, self.exchange = options, engine, exchange
        self.front: Front | None = None  # the page that is served; it enters itself
        self.change: Change | None = None  # the change that is running, or the last change if it failed
        self.used = [options.model]  # names of the models that were served, the latest last
        self._thread: Thread | None = None
        self._lock = Lock()

    @property
    def name(self) -> str:
        """The model that answers, as the user named it."""
        return self.options.model

    @property
    def running(self) -> Change | None:
        """The change that is running."""
        return self.change if self.change is not None and not self.change.is_over else None

    def choose(self, name: str) -> None:
        """Begin a change to another model. Raises ModelError if there is nothing to change, or another change is running."""
        name = name.strip()
        with self._lock:
            if self.exchange is None:
                raise ModelError("this server keeps its model")
            if self.running is not None:
                raise ModelError(f"{short_name(self.running.name)} is on its way; cancel it first, or wait for it")
            if not name:
                raise ModelError("name a folder, a .gguf file or a Hugging Face id")
            if name == self.name and not self.engine.worker.closed:
                raise ModelError(f"{short_name(name)} answers already")
            self.change = Change(name)
            self._thread = Thread(target=self._run, args=(self.change,), name="pitlane-model", daemon=True)
            self._thread.start()

    def cancel(self) -> None:
        """End the running change; the old model stays."""
        if self.running is not None:
            self.running.cancelled.set()

    def close(self) -> None:
        """End a running change and close the engine."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        self.engine.close()

    def __enter__(self) -> ModelSwitch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def estimate(self, name: str) -> MemoryEstimate:
        """The memory that a model on this machine takes with the options of this server."""
        from pitlane.models import estimate_memory

        options, registry = self.options, self.engine.registry
        return estimate_memory(
            name,
            options.context,
            dtype=options.dtype,
            device=options.device,
            plugins=lambda default: options.settings(registry, default).settings,
            registry=registry,
        )

    @property
    def own_bytes(self) -> int:
        """Memory that closing the engine sets free, at least: its weights. Its KV is counted as it grows, so it is left out."""
        return 0 if self.engine.worker.closed else int(self.engine.loader.describe()["weight_bytes"])

    # ---- the thread of a change

    def _run(self, change: Change) -> None:
        before = self.options
        try:
            self._change(change)
            self.change = None
        except Exception as error:
            if not isinstance(error, (PitlaneError, _Cancelled)):
                log.exception("%s was not loaded", change.name)
            was_cancelled = change.cancelled.is_set()
            reason = f"{short_name(change.name)} is not loaded: {_line(error)}"
            if change.is_alone:
                reason += self._restored(before)
            change.reason, change.ended, change.phase = reason, time.monotonic(), "failed"
            if was_cancelled and not change.is_alone:
                self.change = None

    def _change(self, change: Change) -> None:
        from pitlane.models import fetch

        options = replace(self.options, model=change.name)
        fetch(change.name, self.engine.registry, change.advance, change.decode)
        change.check()
        change.phase = "loading"
        if not self._fits_beside(change.name):
            self._wait(change)
            self._close(self.engine)
            change.is_alone = True
        engine = options.build()
        try:
            self._wait(change)
            self._serve(engine, options)
        except BaseException:
            engine.close()
            if self.front is not None and not change.is_alone:
                self.front.reopen()
            raise

    def _fits_beside(self, name: str) -> bool:
        """Whether a model fits beside the model that answers. Raises ModelError if it does not fit without it either."""
        needs = self.estimate(name)
        if needs.total_bytes <= needs.free_bytes:
            return True
        free = needs.free_bytes + self.own_bytes
        if needs.total_bytes > free:
            raise ModelError(f"it needs {size(needs.total_bytes)} of memory, and {size(free)} are free")
        return False

    def _wait(self, change: Change) -> None:
        """Wait until no answer is running. From then on the page accepts no question."""
        change.phase = "waiting"
        while self.front is not None and not self.front.retire():
            change.check()
            change.cancelled.wait(POLL_SECONDS)
        try:
            change.check()
        except _Cancelled:
            if self.front is not None:
                self.front.reopen()
            raise
        change.phase = "loading"

    def _close(self, engine: Engine) -> None:
        """Close an engine that has answered, and free its memory now."""
        engine.close()
        gc.collect()  # lanes, stores and plugins refer to each other
        trim_heap()  # else the process keeps up to 1.3 GB of two models of 0.3 and 1 GB

    def _serve(self, engine: Engine, options: EngineOptions) -> None:
        old, previous = self.engine, self.options
        self.engine, self.options = engine, options
        try:
            assert self.exchange is not None, "choose() has refused"
            self.exchange(engine)
        except BaseException:
            self.engine, self.options = old, previous
            raise
        self.used = [*(name for name in self.used if name != options.model), options.model]
        self._close(old)

    def _restored(self, options: EngineOptions) -> str:
        """Load the old model again. Returns the end of the reason."""
        try:
            self._serve(options.build(), options)
        except Exception as error:
            log.exception("%s could not be loaded again", options.model)
            return f". {short_name(options.model)} was closed to make room and cannot be loaded again: {_line(error)}"
        return f". {short_name(options.model)} was closed to make room; it is loaded again"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, PitlaneError) else f"{type(error).__name__}: {text}"
