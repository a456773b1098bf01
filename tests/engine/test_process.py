"""An engine and its process: what a dropped engine leaves behind, and what a forked one says."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pitlane import Engine, EngineClosed, Lane, Plugin, PluginFailed, SamplingParams, hookimpl
from pitlane.engine.plan.registry import PluginRegistry

LONG = SamplingParams(max_tokens=3000, ignore_eos=True)
FORKED = "made in another process"


class Fails(Plugin):
    """Starts a thread of its own, then keeps an engine from being made."""

    name, exactness = "fails", "identical"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._end = threading.Event()
        threading.Thread(target=self._end.wait, name="pitlane-fails", daemon=True).start()

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        raise RuntimeError("no lane for me")

    def close(self) -> None:
        self._end.set()


def dropped(plugins: Any = None, **options: Any) -> Engine:
    """An engine that no fixture closes."""
    return Engine("random:tiny", dtype="float32", plugins=plugins, **options)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[], list[str]]]:
    """The names of Pitlane's threads that a test has started; at its end there are none."""
    gc.collect()
    before = set(threading.enumerate())

    def started() -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("pitlane")]

    yield started
    until(lambda: not started())


def test_a_dropped_engine_ends_its_threads_and_gives_back_its_memory(threads: Callable[[], list[str]]) -> None:
    engine = dropped()
    engine.generate([1, 2, 3], SamplingParams(max_tokens=3))
    lane = weakref.ref(engine.lane_of(engine.default_plan))
    store, weights = weakref.ref(lane().stores[0]), weakref.ref(lane().built.variant)  # type: ignore[union-attr]
    assert "pitlane-engine" in threads() and len(threads()) > 1
    del engine
    gc.collect()
    until(lambda: not threads())
    gc.collect()
    assert lane() is None and store() is None and weights() is None


def test_an_engine_lives_as_long_as_its_streams(threads: Callable[[], list[str]]) -> None:
    stream = dropped({}).submit([1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
    gc.collect()
    assert len(stream.result().token_ids) == 40
    running = dropped({}).submit([1, 2], LONG)
    next(iter(running))
    del running
    gc.collect()
    until(lambda: len(threads()) == 1)  # the first stream's engine
    del stream


def test_a_dropped_engine_tells_its_plugins() -> None:
    class Told(Plugin):
        name, exactness = "told", "identical"
        closed = 0

        def close(self) -> None:
            type(self).closed += 1

    registry = PluginRegistry()
    registry.add(Told)
    dropped({"told": {}}, registry=registry)
    until(lambda: Told.closed == 1)
    dropped({"told": {}}, registry=registry).close()
    assert Told.closed == 2


def test_an_engine_that_cannot_be_made_leaves_nothing(threads: Callable[[], list[str]]) -> None:
    registry = PluginRegistry()
    registry.add(Fails)
    with pytest.raises(PluginFailed, match="no lane for me") as caught:
        dropped({"fails": {}}, registry=registry)
    until(lambda: not threads())
    assert caught.value.__traceback__ is not None, "the error still holds the engine"


def test_closing_twice_or_from_two_threads_is_safe(threads: Callable[[], list[str]]) -> None:
    engine = dropped()
    stream = engine.submit([1, 2], LONG)
    closing = [threading.Thread(target=engine.close) for _ in range(3)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    engine.close()
    assert stream.result().finish_reason == "aborted" and threads() == []
    for call in (lambda: engine.submit([1]), lambda: engine.plan({}), lambda: engine.lane_of(engine.default_plan)):
        with pytest.raises(EngineClosed, match="the engine is closed; make a new one"):
            call()


# ---- fork


def in_child(action: Callable[[], None]) -> None:
    """Run an action in a forked process; it must end by itself, without an error, within seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(EngineClosed, match=FORKED):
        call()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("is_running", [False, True], ids=["idle", "in a step"])
def test_a_forked_engine_says_so_and_the_first_one_goes_on(is_running: bool) -> None:
    engine = dropped({})
    stream = engine.submit([1, 2], LONG)
    events = iter(stream)
    next(events)
    if not is_running:
        stream.abort()
        done = stream.result()

    def used() -> None:
        for call in (
            lambda: engine.submit([1]),
            lambda: engine.generate([1]),
            lambda: engine.generate([[1], [2]]),
            lambda: engine.plan({"prefix_cache": {}}),
        ):
            refused(call)
        if is_running:
            refused(stream.result)
            refused(lambda: next(events))
            refused(lambda: asyncio.run(read()))
        else:
            assert stream.result() is done
        engine.close()

    async def read() -> None:
        async for _ in stream:
            pass

    in_child(used)
    in_child(lambda: engine.close())
    assert len(engine.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3
    engine.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_locks_are_held_does_not_wait_for_them() -> None:
    engine = dropped({})
    with engine.worker._wake, engine.lanes._building, engine.lanes._lock, engine.planner._lock:

        def used() -> None:
            with ThreadPoolExecutor() as pool:  # other threads than the one that holds them
                pool.submit(engine.close).result(5)
                for call in (lambda: engine.submit([1]), lambda: engine.plan({})):
                    pool.submit(refused, call).result(5)

        in_child(used)
    engine.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_new_engine_can_be_made_in_a_forked_process() -> None:
    engine = dropped()
    expected = engine.generate([1, 2], SamplingParams(max_tokens=5)).token_ids

    def used() -> None:
        with dropped() as other:
            assert other.generate([1, 2], SamplingParams(max_tokens=5)).token_ids == expected

    in_child(used)
    engine.close()
