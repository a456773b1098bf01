"""The page: `launch` serves it, `build_page` makes its widgets and connects them to the handlers of `ui/handlers.py`.

Three columns: conversations and documents, the thread, plugins. The page loads nothing from other machines and sends nothing to
them. The state of a tab is ids and plain values; all tabs share one engine and one store in the `Desk`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import webbrowser
from typing import Any

from pitlane import Engine
from pitlane.storage.db import Store
from pitlane.storage.errors import PitlaneError
from pitlane.ui.answering import Desk
from pitlane.ui.handlers import Handlers
from pitlane.ui.layout import acting, left_column, middle_column, model_menu, right_column
from pitlane.ui.login import Login, is_loopback, new_password
from pitlane.ui.model_menu import header_html, state_of
from pitlane.ui.model_switch import ModelSwitch
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import new_tab
from pitlane.ui.page_server import PageServer, page_id
from pitlane.ui.page_view import Widgets
from pitlane.ui.render import note
from pitlane.ui.session import EngineOptions
from pitlane.ui.wiring import join, keep

PORTS_TRIED = 20


def launch(
    options: EngineOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = True,
    notice: str = "",
    password: str = "",
) -> None:
    """Load the model, serve the page until Ctrl-C. Raises PitlaneError for whatever a user can cause.

    notice: shown on the page and in the terminal. password: asked for in every browser. Without a password, an address that
    other machines reach gets a random one, which the terminal prints.
    """
    password = password or ("" if is_loopback(host) else new_password())
    login = Login(password) if password else None
    port = free_port(host, port)
    with (
        Store() as store,  # first, so that an unusable home is refused before a model is loaded
        tempfile.TemporaryDirectory(prefix="pitlane-uploads-", ignore_cleanup_errors=True) as uploads,
        PageServer(host, port, login) as server,
        ModelSwitch(options, options.build()) as switch,
    ):
        os.environ["GRADIO_TEMP_DIR"] = uploads  # uploads stay here until they are in the store
        serve(switch, store, server, notice)
        if notice:
            note(notice)
        note(switch.engine.loader.describe_memory())
        address = server.url if login is None else login.link(server.url)
        print(f"Pitlane is at {address} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(server.url)  # without the password: every user of this machine can list arguments
        try:
            server.wait()
        except KeyboardInterrupt:
            note("closing")


def serve(switch: ModelSwitch, store: Store, server: PageServer, notice: str = "") -> None:
    """Serve the page over the engine of the switch. From then on the switch serves pages over other engines in its place.

    notice: shown by the first page; it is about the first model.
    """

    def exchange(engine: Engine, notice: str = "") -> None:
        desk = Desk(engine, store)
        desk.restore()
        page = asyncio.run(_built(desk, switch, notice))
        assert switch.front is not None, "build_page has made the page the front"
        server.show(page, lambda: state_of(switch), desk.release, store, switch.front.frame)

    switch.exchange = exchange
    exchange(switch.engine, notice)


async def _built(desk: Desk, switch: ModelSwitch, notice: str) -> Any:
    """A page built where a loop runs; elsewhere Gradio opens a loop for each of its locks and leaves it open."""
    return build_page(desk, switch, notice)


def free_port(host: str, port: int) -> int:
    """The given port, or the first free port of the next few; 0 takes any free port."""
    for candidate in range(port, port + PORTS_TRIED) if port else (0,):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            return int(probe.getsockname()[1])
    raise PitlaneError(
        f"cannot listen on {host}, ports {port} to {port + PORTS_TRIED - 1} ({reason}); give --host and --port"
    )


def build_page(desk: Desk, switch: ModelSwitch, notice: str = "") -> Any:
    """Build the page over a desk, as gr.Blocks that are not served yet. It is the front of the switch from then on.

    notice: shown when a tab opens.
    """
    engine = desk.engine
    with gr.Blocks(title="Pitlane", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        tab = gr.State(new_tab())
        anchor, kept, attached = (gr.Textbox(visible="hidden", show_label=False) for _ in range(3))
        top = acting(header_html(engine, page_id(page)), elem_id="top")
        menu = model_menu()
        with gr.Row(elem_id="frame"):
            with gr.Column(elem_id="left", min_width=0):
                left = left_column()
            with gr.Column(elem_id="middle", min_width=0):
                middle = middle_column()
            with gr.Column(elem_id="right", min_width=0):
                right = right_column(engine)
        widgets = Widgets(tab=tab, attached=attached, top=top, **menu, **left, **middle, **right)
        handlers = Handlers(desk, widgets, switch, notice)
        switch.front = handlers
        join(page, handlers, widgets)
        keep(page, handlers, widgets, anchor, kept)
    return page
