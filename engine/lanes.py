"""The open lanes of an engine. Opens and drops lanes while the engine runs.

`ready` takes no lock and waits for nothing. `open` returns a future: a separate thread loads weights and draft models, so a
request for an open lane never waits for a load. Lanes are built one at a time: two builds would count the same free memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from pitlane.engine.errors import BadOption, EngineClosed
from pitlane.engine.kv.state import PrefixMatch
from pitlane.engine.loader import MAX_LANES, Loader
from pitlane.engine.plan.dispatch import Dispatcher, named
from pitlane.engine.plan.hooks import HookError, call, refuse
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.lane import Lane
from pitlane.engine.sequence import Sequence
from pitlane.engine.worker import Worker, release_threads


class Lanes:
    """by_key: the open lanes by `Plan.lane_key`. `_opening`: the future lane of every plan that is not ready yet."""

    def __init__(self, loader: Loader, dispatch: Dispatcher, worker: Worker) -> None:
        self.loader, self.dispatch, self.worker = loader, dispatch, worker
        loader.is_stopped = lambda: worker.closed
        self.by_key: dict[tuple[str, ...], Lane] = {}
        self._opening: dict[Plan, Future[Lane]] = {}
        self._lock = threading.Lock()  # guards `_opening`; held briefly, because the engine's thread takes it too
        self._building = threading.Lock()  # held while a lane is built; the engine's thread never takes it

    @property
    def all(self) -> list[Lane]:
        return list(self.by_key.values())

    def ready(self, plan: Plan) -> Lane | None:
        """Return the lane of a plan if a request can start at once, else None."""
        lane = self.by_key.get(plan.lane_key)
        return lane if lane is not None and lane.is_open(plan) else None

    def open(self, plan: Plan) -> Future[Lane]:
        """Return a future of the lane of a plan. A new thread opens the lane."""
        future, is_new = self._future(plan)
        if is_new:
            try:
                threading.Thread(target=self._open, args=(plan, future), name="pitlane-load").start()
            except RuntimeError as error:  # the system allows no further thread
                with self._lock:
                    del self._opening[plan]
                future.set_exception(error)
        return future

    def open_here(self, plan: Plan) -> Lane:
        """Return the lane of a plan. If it is not ready, open it on the calling thread, or wait if another thread opens it."""
        lane = self.ready(plan)
        if lane is not None:
            return lane
        future, is_new = self._future(plan)
        if is_new:
            self._open(plan, future)
        return future.result()

    def close(self) -> None:
        """Close the plugins' objects in all lanes, and let the lanes go: a closed engine that is still held frees its memory."""
        lanes = self.all
        self.by_key.clear()
        for lane in lanes:
            lane.close()

    def _future(self, plan: Plan) -> tuple[Future[Lane], bool]:
        with self._lock:
            future = self._opening.get(plan)
            is_new = future is None
            if future is None:
                future = self._opening[plan] = Future()
            return future, is_new

    def _open(self, plan: Plan, future: Future[Lane]) -> None:
        error: Exception | None = EngineClosed("the lane was not opened: its loading was interrupted")
        try:
            lane = self._opened(plan)
            error = None
        except Exception as reason:
            error = reason
        finally:
            with self._lock:
                del self._opening[plan]
            if error is None:
                future.set_result(lane)
            else:
                future.set_exception(error)
            release_threads()

    def _opened(self, plan: Plan) -> Lane:
        """The lane of a plan, built if need be, and prepared for the plan."""
        while True:
            lane = self.by_key.get(plan.lane_key) or self._build(plan)
            self._prepare(lane, plan)
            if self.worker.closed:
                lane.close()
                self.worker.check()
            if self.by_key.get(plan.lane_key) is lane:
                return lane
            lane.close()  # it was dropped to make room, before it was prepared

    def _build(self, plan: Plan) -> Lane:
        with self._building:
            if plan.lane_key not in self.by_key:
                self._make_room()  # recipes are made only if the weights fit, and idle lanes make room for them
        prepared = self.loader.make_recipes(plan)
        with self._building:
            lane = self.by_key.get(plan.lane_key)
            if lane is None:
                self._make_room()
                lane = self.loader.build_lane(plan, self._match, self._reclaim, self.worker.call, prepared)
                with _blaming(lane):
                    self.worker.call(lambda: lane.warm_up(self.loader.warm_up_tokens)).result()
                self.by_key[plan.lane_key] = lane
            return lane

    def _prepare(self, lane: Lane, plan: Plan) -> None:
        with lane.opening:
            if plan in lane.opened:
                return  # another thread prepared it after this thread had found it not ready
            if plan.drafter is not None and not lane.is_calibrated:
                with _blaming(lane):
                    lane.calibrate()
            call(plan.hook("lane_opened"), None, refuse, lane=lane)
            lane.open_for(plan)

    def _make_room(self) -> None:
        """If `MAX_LANES` lanes are open, drop the idle lane that was used least recently."""
        if len(self.by_key) < MAX_LANES:
            return
        dropped: list[Lane] = []

        def drop() -> None:
            """Runs on the engine's thread: no request can enter the lane before it is dropped."""
            idle = {key: lane for key, lane in self.by_key.items() if not (lane.has_work or lane.opening.locked())}
            if idle:
                dropped.append(self.by_key.pop(min(idle, key=lambda key: idle[key].last_used)))

        self.worker.call(drop).result()
        if not dropped:
            raise BadOption(f"{MAX_LANES} lanes are busy; wait for an answer, or use fewer different sets of plugins")
        dropped.pop().close()
        if self.loader.device.type == "cuda":
            torch.cuda.empty_cache()  # so that the memory counts as free

    # ---- on the engine's thread

    def _match(self, lane: Lane, seq: Sequence) -> PrefixMatch | None:
        answer = self.dispatch.call([seq], seq.plan.hook("match_prefix"), _prefix_match, seq=seq, lane=lane)
        if answer is None:
            return None
        match: PrefixMatch = answer.value
        seq.kv.prefix_plugin = answer.plugin.name
        if match.loading is not None:
            # The empty action wakes the engine's thread when the tensors are loaded.
            match.loading.add_done_callback(lambda _: self.worker.post(lambda: None))
        return match

    def _reclaim(self, lane: Lane, num_blocks: SequenceOf[int]) -> None:
        self.dispatch.tell(lane.reclaimers.values(), lane=lane, num_blocks=num_blocks)


def _prefix_match(plugin: Plugin, result: object) -> PrefixMatch:
    if not isinstance(result, PrefixMatch):
        raise TypeError(f"returned {result!r}, not a PrefixMatch")
    return result


@contextmanager
def _blaming(lane: Lane) -> Iterator[None]:
    """Raise PluginFailed, with the name of the plugin, if a part of a plugin fails in a first forward."""
    try:
        yield
    except (Exception, SystemExit) as error:
        plugin = lane.built.culprit(error)
        if plugin is not None:
            refuse(HookError(plugin, "forward", error))
        if isinstance(error, SystemExit):  # it must not end the caller's process
            raise named(error, "the first forward failed") from error
        raise
