"""A stopped answer leaves the engine within one step, and answers of two tabs with two plans do not touch each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from threading import Thread
from typing import Any

import pytest

from pitlane.engine.run.scheduler import Scheduler
from tests.ui.page_harness import OTHER_TAB, TAB, last, new_tab, values

Answer = Iterator[Any]


def idle(page: Any) -> bool:
    """Wait until the engine has no sequence; False after five seconds."""
    deadline = time.monotonic() + 5
    while page.engine.roster.seqs and time.monotonic() < deadline:
        time.sleep(0.002)
    return not page.engine.roster.seqs


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda page, answer: page.handlers.stop(TAB), id="stop button"),
        pytest.param(lambda page, answer: page.handlers.close(TAB), id="closed tab"),
        pytest.param(lambda page, answer: answer.close(), id="closed event"),
    ],
)
def test_a_stopped_answer_frees_its_sequence_within_one_step(
    page: Any, monkeypatch: pytest.MonkeyPatch, end: Callable[[Any, Answer], Any]
) -> None:
    page.engine.loader.eos_token_ids = frozenset()
    free: list[int] = []  # blocks, before each step
    pools: list[Any] = []
    schedule = Scheduler.schedule

    def counted(scheduler: Scheduler) -> Any:
        free.append(scheduler.pool.num_free_blocks)
        pools.append(scheduler.pool)
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", counted)
    answer = page.handlers.ask(TAB, "Go on", new_tab(), *values(page, (), max_tokens=100_000))
    list(islice(answer, 2))
    while len(free) < 20:
        time.sleep(0.002)
    assert page.engine.roster.seqs and min(free) < free[0]
    num_steps = len(free)
    end(page, answer)
    assert idle(page)
    assert len(free) - num_steps <= 1, "the step that ran may end, and no other begins"
    assert pools[-1].num_free_blocks == free[0]
    last(answer)


def test_two_tabs_with_two_plans_at_once_do_not_touch_each_other(page: Any) -> None:
    page.engine.loader.eos_token_ids = frozenset()
    tabs = ((TAB, "What is this?", ("prefix_cache",)), (OTHER_TAB, "And that?", ("prefix_cache", "echo")))
    ends: dict[str, Any] = {}

    def ask(request: Any, text: str, plugins: tuple[str, ...]) -> None:
        ends[text] = last(page.handlers.ask(request, text, new_tab(), *values(page, plugins, max_tokens=120)))

    def answer_of(text: str) -> Any:
        key = ends[text][page.handlers.ui.tab]["conversation"]
        return page.store.conversations.get(key).messages[-1]

    threads = [Thread(target=ask, args=arguments) for arguments in tabs]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(page.handlers.writing) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    shown = [page.handlers.shown_writing(request) for request, *_ in tabs]
    assert [writing.messages[-1].text for writing in shown] == [text for _, text, _ in tabs]
    for thread in threads:
        thread.join()
    together = {text: answer_of(text) for _, text, _ in tabs}
    for request, text, plugins in tabs:
        assert sorted(together[text].stats["plugins"]) == sorted(plugins)
        ask(request, text, plugins)
        assert answer_of(text).token_ids == together[text].token_ids, "the same answer as alone"
        assert text in ends[text][page.handlers.ui.thread]
