"""The page without a browser, for tests of its handlers."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pitlane import Draft, Plugin, hookimpl
from pitlane.engine.text import document_worker
from pitlane.storage.db import Store
from pitlane.ui.answering import Desk
from pitlane.ui.app import build_page
from pitlane.ui.handlers import Handlers
from pitlane.ui.model_switch import ModelSwitch
from pitlane.ui.page_view import Widgets
from pitlane.ui.session import EngineOptions

# The tests of these files need the process that reads a document. tests/engine/text/test_documents.py tests that process.
READ_IN_A_PROCESS = {"test_reading.py", "test_restart.py"}


@pytest.fixture(autouse=True)
def read_documents_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read documents in this process, without limits of memory and time: a process takes 0.3 s for each document."""
    if request.path.name in READ_IN_A_PROCESS:
        return
    lock = threading.Lock()  # pypdfium2 is for a single thread

    def read(values: dict[str, Any], limits: Any) -> dict[str, Any]:
        with lock:
            return document_worker._encode(document_worker.read(values))

    monkeypatch.setattr(document_worker, "_limit", lambda memory_bytes, cpu_seconds: None)
    monkeypatch.setattr("pitlane.engine.text.documents._read_in_child", read)


async def built(engine: Any, store: Store, notice: str = "") -> Any:
    """A page made where a loop runs; elsewhere Gradio opens one for each of its locks and leaves it open.

    Its handlers are called, its HTTP routes never: Gradio makes all of them twice, which takes half the time of a page.
    """
    switch = ModelSwitch(EngineOptions(engine.loader.source.name), engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.routes.App.create_app", lambda *args, **kwargs: None)
        return build_page(Desk(engine, store), switch, notice)


class Echo(Plugin):
    """A drafter of one token: the last token again."""

    name, role, exactness = "echo", "drafter", "identical"

    @hookimpl
    def propose(self, seqs: Any, limits: Any) -> Any:
        return [Draft([seq.token_ids[-1]]) for seq in seqs]


@pytest.fixture(scope="session")
def built_pages() -> dict[str, tuple[Any, Widgets]]:
    """The widgets of a page by the arguments of its engine. Gradio takes longer to make them than most tests take."""
    return {}


@pytest.fixture
def model() -> dict[str, Any]:
    """The arguments of the page's engine."""
    return {}


@pytest.fixture
def page(
    make_engine: Any,
    model: dict[str, Any],
    built_pages: dict[str, tuple[Any, Widgets]],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A built page over a tiny model with two drafters and one plugin that failed, its handlers and its store.

    Engine, store and handlers are of this test alone. The widgets are those of all tests with such an engine: they are values.
    """
    # Events of an unfinished answer yield often, so that tests do not wait for a yield.
    for module in ("answer_events", "waiting_line"):
        monkeypatch.setattr(f"pitlane.ui.{module}.ALIVE_SECONDS", 0.05)
    engine = make_engine(plugins={"prefix_cache": {}}, **model)
    engine.registry.add(Echo)
    with Store() as store:
        kind = repr(sorted(model.items()))
        if kind not in built_pages:
            blocks = asyncio.run(built(engine, store))
            first = next(
                fn.fn.__self__ for fn in blocks.fns.values() if isinstance(getattr(fn.fn, "__self__", None), Handlers)
            )
            built_pages[kind] = blocks, first.ui
        blocks, widgets = built_pages[kind]
        widgets.controls.registry = engine.registry
        switch = ModelSwitch(EngineOptions(engine.loader.source.name), engine)
        handlers = switch.front = Handlers(Desk(engine, store), widgets, switch)
        yield SimpleNamespace(blocks=blocks, handlers=handlers, store=store, desk=handlers.desk, engine=engine)


@pytest.fixture
def warnings_shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the warnings that handlers show in the corner of the page."""
    shown: list[str] = []
    monkeypatch.setattr("gradio.Warning", shown.append)
    return shown
