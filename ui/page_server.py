"""The web server of the page: one socket from start to end, while the page behind it may be exchanged.

Gradio cannot serve another page on the socket of the first. So this server owns the socket and hands each request to the page that
is shown now. Requests that began on the page before go on there for a few seconds. A browser tab of an earlier page may raise no
event here, because the numbers of its widgets belong to its own page; page.js reloads such a tab.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from pitlane.storage.db import Store
from pitlane.storage.errors import PitlaneError
from pitlane.ui.export import export
from pitlane.ui.login import Login
from pitlane.ui.offline_gradio import gr

HERE = Path(__file__).parent
MAX_FILE_SIZE = "100mb"
MAX_ANSWERS = 8  # answers at once; the engine batches them
MAX_TAB_LENGTH = 40
SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif"]
STATE_PATH = "/pitlane/model"
LIVE_PATH = "/pitlane/live/"
EXPORT_PATH = "/pitlane/export/{conversation}.{kind}"
GRACE_SECONDS = 5.0  # an exchanged page ends its events; its tabs ask for the state every 2.5 s
# Between two looks of Gradio at its queue and at its progress bars (the page has none). With Gradio's own 0.001 and 0.01 s, the
# server woke 1,500 times a second, also without events. This took a tenth of a core, and the interpreter's lock from the engine.
QUEUE_SECONDS, PROGRESS_SECONDS = 0.02, 1.0
START_SECONDS, STOP_SECONDS, WAIT_SECONDS = 20.0, 3.0, 0.2
STALE = "The model was changed; this page loads again in a moment."
State = Callable[[], dict[str, Any]]
Frame = Callable[[str, str, int], dict[str, Any]]  # see AnswerEvents.frame


class PageServer:
    """Serves a page of Gradio, and later pages in its place. Closes with the block. `url` is known from the first page on.

    login: asks every browser for the password. state: what page.js asks for, as a dictionary; the id of the page is added.
    """

    def __init__(self, host: str, port: int, login: Login | None = None) -> None:
        self.url = f"http://{host}:{port}"
        self._login = login
        config = uvicorn.Config(self, host=host.strip("[]"), port=port, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._app: Any = None
        self._frame: Frame = lambda *_: {"over": True}
        self._page = ""
        self._sessions: set[str] = set()  # browser tabs of the page that is shown
        self._stale: set[str] = set()  # browser tabs of earlier pages
        self._over = asyncio.Event()  # set when the page that is shown is exchanged
        self._lives: set[asyncio.Task[None]] = set()  # the page that is shown, and exchanged pages until their end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pitlane-page", daemon=True)

    def show(
        self,
        page: Any,
        state: State = dict,
        ended: Callable[[], None] = lambda: None,
        store: Store | None = None,
        frame: Frame = lambda *_: {"over": True},
    ) -> None:
        """Serve a page, in place of the page before if there is one.

        ended: called when the page is exchanged and its events ended. store: of the conversations that can be exported.
        frame: of an unfinished answer.
        """
        app = _app(page, state, store)
        if self._loop is None:
            self._thread.start()
            self._await_start()
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._exchange(app, page, ended, frame), self._loop).result()

    def wait(self) -> None:
        """Wait until the server ends. Ctrl-C ends the wait."""
        while not self._ended.wait(WAIT_SECONDS):  # Ctrl-C in Thread.join would leave the thread looking dead
            pass

    def close(self) -> None:
        """End the page and the server. Connections that stay open are dropped."""
        if self._loop is None or self._ended.is_set():
            return
        self._loop.call_soon_threadsafe(self._over.set)
        self._server.should_exit = self._server.force_exit = True
        self._ended.wait(STOP_SECONDS)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a request to the page. Refuse events of tabs of earlier pages, and browsers without the password."""
        if self._login is not None and not await self._login(scope, receive, send):
            return
        if scope["type"] == "http" and scope["path"].startswith(LIVE_PATH):
            # a browser asks many times a second, so the request bypasses Gradio's app
            await self._live_frame(scope)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/queue/join"):
            body = await _body(receive)
            session, receive = _session(body), _again(body, receive)
            if session in self._stale:
                await JSONResponse({"detail": STALE}, 409)(scope, receive, send)
                return
            self._sessions.add(session)
        await self._app(scope, receive, send)

    def _live_frame(self, scope: Any) -> Response:
        """The next frame of the answer that the path names, for the tab and after the frame number that the query names."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        tab, number = query.get("tab", [""])[0][:MAX_TAB_LENGTH], query.get("number", ["0"])[0][:18]
        frame = self._frame(scope["path"].removeprefix(LIVE_PATH), tab, int(number) if number.isdecimal() else 0)
        return JSONResponse(frame | {"page": self._page}, headers={"Cache-Control": "no-store"})

    # ---- the thread of the server

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        finally:
            self._ended.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve()

    def _await_start(self) -> None:
        for _ in range(int(START_SECONDS / 0.01)):
            if self._server.started:
                return
            if self._ended.wait(0.01):
                break
        raise PitlaneError(f"cannot serve the page at {self.url}; give another --host or --port")

    async def _exchange(self, app: FastAPI, page: Any, ended: Callable[[], None], frame: Frame) -> None:
        over, ready = asyncio.Event(), asyncio.Event()
        life = asyncio.create_task(_live(app, page, ready, over, ended))
        self._lives.add(life)  # asyncio itself keeps no task alive
        life.add_done_callback(self._lives.discard)
        started = asyncio.create_task(ready.wait())
        await asyncio.wait({life, started}, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            started.cancel()
            life.result()  # raises the error of the start
        self._over.set()
        self._app, self._over, self._frame, self._page = app, over, frame, page_id(page)
        self._stale |= self._sessions
        self._sessions = set()


def _app(page: Any, state: State, store: Store | None = None) -> FastAPI:
    """A page as an ASGI app, with all of Gradio's sharing and monitoring off."""
    parent = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def answer() -> JSONResponse:
        return JSONResponse({"page": page_id(page)} | state(), headers={"Cache-Control": "no-store"})

    def exported(conversation: str, kind: str) -> Response:
        try:
            file = export(store, conversation, kind) if store is not None else None
        except PitlaneError as error:
            return PlainTextResponse(str(error), 404)
        if file is None:
            return PlainTextResponse("this page has no store", 404)
        headers = {"Content-Disposition": f'attachment; filename="{file.name}"', "Cache-Control": "no-store"}
        return Response(file.text, media_type=file.mime, headers=headers)

    queue = page.queue(default_concurrency_limit=MAX_ANSWERS)._queue
    queue.sleep_when_free, queue.progress_update_sleep_when_free = QUEUE_SECONDS, PROGRESS_SECONDS
    parent.get(STATE_PATH)(answer)
    parent.get(EXPORT_PATH, response_model=None)(exported)
    return gr.mount_gradio_app(  # type: ignore[no-any-return]
        parent,
        page,
        "/",
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        footer_links=[],
        show_error=False,
        max_file_size=MAX_FILE_SIZE,
        theme=theme(),
        css_paths=[HERE / "page.css", HERE / "compare.css"],
        head=f"<script>window.pitlaneKatex = {json.dumps(katex_path())};{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    )


def katex_path() -> str:
    """The path of the KaTeX that Gradio serves for its own Markdown; empty if this version of Gradio has no such file."""
    folder = Path(gr.__file__).parent / "templates" / "frontend" / "assets"
    return next((f"./assets/{path.name}" for path in sorted(folder.glob("katex-*.js"))), "")


def page_id(page: Any) -> str:
    """The id of a page; as text, because it has more bits than a number of JavaScript."""
    return str(page.app_id)


async def _live(app: FastAPI, page: Any, ready: asyncio.Event, over: asyncio.Event, ended: Callable[[], None]) -> None:
    """Run a page from its start to its end. Its queue and its clean-up end with it."""
    async with app.router.lifespan_context(app):
        ready.set()
        await over.wait()
        await asyncio.sleep(GRACE_SECONDS)
    page.close(verbose=False)
    ended()


def theme() -> Any:
    """Gradio's plainest theme with local fonts; page.css sets the colours."""
    fonts = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), *map(gr.themes.Font, SYSTEM_FONTS)]
    mono = [
        gr.themes.LocalFont("IBM Plex Mono", weights=(400,)),
        gr.themes.Font("ui-monospace"),
        gr.themes.Font("monospace"),
    ]
    return gr.themes.Base(primary_hue="emerald", neutral_hue="slate", font=fonts, font_mono=mono)


async def _body(receive: Any) -> bytes:
    """The body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that gives a body which was read already, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    return next_message


def _session(body: bytes) -> str:
    try:
        return str(json.loads(body).get("session_hash"))
    except (ValueError, AttributeError):
        return ""
