"""Streams: order, errors, aborts; in plain and in async code, from one thread to another."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import cast

import pytest

from pitlane import Finished, PitlaneError, PrefillProgress, Result, TextDelta
from pitlane.engine.events import Event
from pitlane.engine.stream import Stream

RESULT = Result("ab", [1, 2], "stop", {})
EVENTS: list[Event] = [PrefillProgress(1, 2, 0), TextDelta("a", (1,)), TextDelta("b", (2,)), Finished(RESULT)]


class Aborts:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def aborts() -> Aborts:
    return Aborts()


def filled(aborts: Callable[[], None], *events: Event | Exception) -> Stream:
    stream = Stream(aborts)
    for event in events or EVENTS:
        stream.put(event)
    return stream


def feed(stream: Stream, *events: Event | Exception, pause: float = 0.002) -> threading.Thread:
    """Put events from another thread, slowly."""

    def run() -> None:
        for event in events or EVENTS:
            time.sleep(pause)
            stream.put(event)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# ---- plain


def test_a_caller_of_result_sleeps_until_the_end_and_keeps_no_events(aborts: Aborts) -> None:
    stream = Stream(aborts)
    results: list[Result] = []
    caller = threading.Thread(target=lambda: results.append(stream.result()))
    caller.start()
    deadline = time.monotonic() + 5
    while not stream._wants_end_alone:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for event in EVENTS[:-1]:
        stream.put(event)
    assert stream._events.empty() and caller.is_alive()
    stream.put(EVENTS[-1])
    caller.join(5)
    assert results == [RESULT] and stream.result() is RESULT and aborts.count == 0


def test_events_come_in_order_and_end_with_finished(aborts: Aborts) -> None:
    stream = Stream(aborts)
    thread = feed(stream)
    assert list(stream) == EVENTS
    thread.join()
    assert list(stream) == [] and aborts.count == 0


def test_a_stream_says_whether_the_next_read_waits(aborts: Aborts) -> None:
    stream = filled(aborts)
    ready = [(event, stream.is_empty) for event in stream]
    assert ready == [*((event, False) for event in EVENTS[:-1]), (EVENTS[-1], True)]


def test_the_result_waits_and_may_be_asked_for_again(aborts: Aborts) -> None:
    stream = Stream(aborts)
    thread = feed(stream)
    assert stream.result() is RESULT and stream.result() is RESULT
    thread.join()
    read = filled(aborts)
    assert len(list(read)) == 4 and read.result() is RESULT
    assert aborts.count == 0


def test_an_error_is_raised_after_what_came_before(aborts: Aborts) -> None:
    stream = filled(aborts, EVENTS[0], PitlaneError("out of luck"))
    found = []
    with pytest.raises(PitlaneError, match="out of luck"):
        for event in stream:
            found.append(event)
    assert found == EVENTS[:1] and list(stream) == []
    with pytest.raises(PitlaneError, match="out of luck"):
        stream.result()
    assert aborts.count == 0, "there is nothing left to abort"


def test_result_raises_the_error(aborts: Aborts) -> None:
    with pytest.raises(PitlaneError, match="out of luck"):
        filled(aborts, PitlaneError("out of luck")).result()


def test_abort_before_the_end_only(aborts: Aborts) -> None:
    stream = filled(aborts)
    stream.abort()
    assert aborts.count == 1
    assert stream.result() is RESULT, "what was generated still arrives"
    stream.abort()
    assert aborts.count == 1


def test_leaving_the_loop_early_aborts(aborts: Aborts) -> None:
    stream = filled(aborts)
    for _ in stream:
        break
    assert aborts.count == 1
    assert stream.result() is RESULT
    for _ in filled(aborts):
        pass
    assert aborts.count == 1


def test_an_error_in_the_loop_aborts(aborts: Aborts) -> None:
    with pytest.raises(ZeroDivisionError):
        for event in filled(aborts):
            assert event is EVENTS[0]
            raise ZeroDivisionError
    gc.collect()
    assert aborts.count >= 1


def test_leaving_the_with_block_aborts(aborts: Aborts) -> None:
    with filled(aborts) as left:
        assert aborts.count == 0
    assert aborts.count == 1
    with filled(aborts) as read:
        read.result()
    assert aborts.count == 1 and left.result() is RESULT


def test_garbage_collection_aborts(aborts: Aborts) -> None:
    stream = filled(aborts)
    gone = weakref.ref(stream)
    del stream
    gc.collect()
    assert gone() is None and aborts.count == 1
    finished = filled(aborts)
    finished.result()
    del finished
    gc.collect()
    assert aborts.count == 1


# ---- async


async def collect(stream: Stream) -> list[Event]:
    return [event async for event in stream]


def test_async_events_that_are_there_already(aborts: Aborts) -> None:
    assert asyncio.run(collect(filled(aborts))) == EVENTS
    assert aborts.count == 0


def test_async_events_from_a_thread_leave_the_loop_free(aborts: Aborts) -> None:
    async def main() -> tuple[list[list[Event]], int]:
        streams = [Stream(aborts) for _ in range(3)]
        threads = [feed(stream, pause=0.01) for stream in streams]
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*map(collect, streams))
        ticking.cancel()
        for thread in threads:
            thread.join()
        return list(found), ticks

    found, ticks = asyncio.run(main())
    assert found == [EVENTS] * 3 and ticks > 5 and aborts.count == 0


def test_no_wake_up_is_lost(aborts: Aborts) -> None:
    """A writer without pauses against a reader that is woken all the time."""
    events: list[Event] = [TextDelta(str(index), (index,)) for index in range(3000)]

    async def main() -> list[Event]:
        stream = Stream(aborts)
        thread = feed(stream, *events, Finished(RESULT), pause=0)
        found = await asyncio.wait_for(collect(stream), 20)
        thread.join()
        return found

    assert asyncio.run(main()) == [*events, Finished(RESULT)]


def test_async_errors_are_raised(aborts: Aborts) -> None:
    async def main() -> None:
        stream = Stream(aborts)
        thread = feed(stream, EVENTS[0], PitlaneError("out of luck"))
        try:
            await collect(stream)
        finally:
            thread.join()

    with pytest.raises(PitlaneError, match="out of luck"):
        asyncio.run(main())
    assert aborts.count == 0


def test_leaving_an_async_loop_early_aborts(aborts: Aborts) -> None:
    stream = filled(aborts)

    async def main() -> None:
        async with contextlib.aclosing(cast("AsyncGenerator[Event, None]", stream.__aiter__())) as events:
            async for _ in events:
                break

    asyncio.run(main())
    assert aborts.count == 1


def test_a_cancelled_task_aborts_and_does_not_disturb_the_engine(aborts: Aborts) -> None:
    stream = Stream(aborts)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(collect(stream), 0.02)

    asyncio.run(main())
    assert aborts.count == 1
    for event in EVENTS:  # the loop is closed; the engine goes on writing
        stream.put(event)
    assert stream.result() is RESULT


def test_the_engine_may_write_after_the_loop_is_gone(aborts: Aborts) -> None:
    """A reader that was not even told: its loop stopped while it waited."""
    stream = filled(aborts, EVENTS[0])
    loop = asyncio.new_event_loop()
    events: AsyncIterator[Event] = stream.__aiter__()
    assert loop.run_until_complete(events.__anext__()) == EVENTS[0]
    loop.close()
    for event in EVENTS[1:]:
        stream.put(event)
    assert stream.result() is RESULT
