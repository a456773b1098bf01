"""The page: `launch` serves it, `build_page` makes its widgets and connects them to the handlers of `ui/handlers.py`.

Three columns: conversations and documents, the thread, plugins. The page loads nothing from other machines and sends nothing to
them. The state of a tab is ids and plain values; all tabs share one engine and one store in the `Desk`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import webbrowser
from typing import Any

from pitlane import Engine
from pitlane.storage.db import Store
from pitlane.storage.errors import PitlaneError
from pitlane.ui.answering import Desk
from pitlane.ui.controls import PluginControls, default_options, others_html, plan_html
from pitlane.ui.document_plugins import document_plugins
from pitlane.ui.handlers import Handlers
from pitlane.ui.login import Login, is_loopback, new_password
from pitlane.ui.model_menu import header_html, state_of
from pitlane.ui.model_switch import ModelSwitch
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_server import MAX_ANSWERS, PageServer, page_id
from pitlane.ui.page_view import Widgets, new_tab
from pitlane.ui.panels import thread_html
from pitlane.ui.render import note
from pitlane.ui.sampling_panel import sampling_panel
from pitlane.ui.session import EngineOptions

FILE_TYPES = [".pdf", ".txt", ".md"]
PORTS_TRIED = 20
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Events that page.js raises on elements with data-do.
EVENTS = (
    "open rename remove attach discard dismiss retry edit try turn_on turn_off take_out look choose cancel compare compare_run "
    "compare_stop switch_on version go_on take_back"
)


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
            webbrowser.open(address)
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
        server.show(asyncio.run(_built(desk, switch, notice)), lambda: state_of(switch), desk.release, store)

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
        top = _acting(header_html(engine, page_id(page)), elem_id="top")
        menu = _menu()
        with gr.Row(elem_id="frame"):
            with gr.Column(elem_id="left", min_width=0):
                left = _left()
            with gr.Column(elem_id="middle", min_width=0):
                middle = _middle()
            with gr.Column(elem_id="right", min_width=0):
                right = _right(engine)
        widgets = Widgets(tab=tab, attached=attached, top=top, **menu, **left, **middle, **right)
        handlers = Handlers(desk, widgets, switch, notice)
        switch.front = handlers
        _join(page, handlers, widgets)
        _keep(page, handlers, widgets, anchor, kept)
    return page


def _html(value: str, **options: Any) -> Any:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **options)


def _acting(value: str, **options: Any) -> Any:
    """HTML whose elements with data-do raise the events named in `EVENTS`."""
    names = " ".join(f"'{name}'" for name in EVENTS.split())
    return gr.HTML(
        value, js_on_load=f"window.pitlane.act(element, trigger); /* {names} */", apply_default_css=False, **options
    )


def _menu() -> dict[str, Any]:
    """The model menu; page.js opens and closes it."""
    with gr.Column(elem_id="models", min_width=0):
        models = _acting("", elem_id="model-list")
        with gr.Row(elem_id="other-model"):
            other = gr.Textbox(
                placeholder="Folder, .gguf file or Hugging Face id", show_label=False, container=False, max_lines=1,
                elem_id="other-name", max_length=4096,
            )  # fmt: skip
            use = gr.Button("Use", elem_id="use-other", size="sm", min_width=0)
    return {"models": models, "other_model": other, "use_other": use}


def _left() -> dict[str, Any]:
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Conversations</h3>")
        new = gr.Button("New", elem_id="new", size="sm", min_width=0)
    search = gr.Textbox(placeholder="Search", show_label=False, container=False, elem_id="search", max_lines=1)
    conversations = _acting("", elem_id="conversations")
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Documents</h3>")
        upload = gr.UploadButton(
            "Add", file_types=FILE_TYPES, file_count="multiple", size="sm", elem_id="upload", min_width=0
        )
    notice = _acting("", elem_id="notice")
    documents = _acting("", elem_id="documents")
    serving = _html("", elem_id="document-plugins")
    sample = gr.Button("Try the sample PDF", elem_id="sample", size="sm")
    return {
        "new": new, "search": search, "conversations": conversations, "upload": upload, "documents": documents,
        "document_plugins": serving, "notice": notice, "sample": sample,
    }  # fmt: skip


def _middle() -> dict[str, Any]:
    with gr.Column(elem_id="scroll"):
        thread = _acting(thread_html([], [], {}, None), elem_id="thread")
        live = _html("", elem_id="live")
        queue = _acting("", elem_id="queue")
    with gr.Column(elem_id="compare"):
        compare_live = _acting("", elem_id="compare-live")
        compare = _acting("", elem_id="compare-view")
    with gr.Column(elem_id="composer"):
        with gr.Row(elem_id="ask"):
            box = gr.Textbox(
                placeholder="Ask something", show_label=False, container=False, lines=1, max_lines=8, elem_id="box",
                autofocus=True, max_length=200_000,
            )  # fmt: skip
            send = gr.Button("Ask", variant="primary", elem_id="send", min_width=0)
            stop = gr.Button("Stop", elem_id="stop", min_width=0, visible="hidden")
        with gr.Row(elem_id="below"):
            plan_line = _html("", elem_id="plan-line")
            meter = _html("", elem_id="meter")
    return {
        "thread": thread, "live": live, "compare": compare, "compare_live": compare_live, "box": box, "send": send,
        "stop": stop, "meter": meter, "plan_line": plan_line, "queue": queue,
    }  # fmt: skip


def _right(engine: Engine) -> dict[str, Any]:
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Plugins</h3>")
    plan = _html(plan_html(engine.default_plan, True), elem_id="plan")
    advice = _acting("", elem_id="advice")
    panel = sampling_panel(engine.loader.source.sampling)
    panel.join()
    default, context = engine.document_plan, engine.loader.build_context
    controls = PluginControls(engine.registry, default, context, document_plugins(engine, default.settings))
    _html(others_html(engine.registry), elem_id="others")
    return {"plan": plan, "advice": advice, "controls": controls, "sampling": panel.inputs}


def _join(page: Any, handlers: Handlers, widgets: Widgets) -> None:
    """Connect events to handlers. Handlers that answer or read may run at the same time; all others take milliseconds.

    Gradio runs the events of one widget in sequence. So the event that asks does not draw the answer: the start of an answer
    changes `live`, and the change event of `live` draws it. In one tab several questions may run at once (`multiple`), because
    every conversation has its own answer.
    """
    quiet = QUIET | {"outputs": widgets.outputs}
    asking = quiet | {"concurrency_limit": MAX_ANSWERS, "concurrency_id": "answers", "trigger_mode": "multiple"}
    values = [widgets.tab, *widgets.sampling, *widgets.controls.inputs]

    page.unload(handlers.close)
    asked = gr.on([widgets.box.submit, widgets.send.click], handlers.ask, [widgets.box, *values], **asking)
    asked.then(handlers.put_back, [widgets.box], [widgets.box], trigger_mode="multiple", **QUIET)
    for name in ("retry", "edit", "go_on", "turn_on", "turn_off", "take_out"):
        getattr(widgets.thread, name)(getattr(handlers, name), values, **asking)
    getattr(widgets.thread, "try")(handlers.try_sample, values, **asking)
    drawing = asking | {"outputs": [widgets.live], "concurrency_id": "drawing"}
    drawing["trigger_mode"] = "always_last"  # a question that waited may begin while the last frame is drawn
    watched = widgets.live.change(handlers.watch, [], **drawing)
    settled = watched.then(handlers.settle, [widgets.tab], **quiet)
    widgets.stop.click(handlers.stop, [], **quiet)
    widgets.thread.version(handlers.version, [widgets.tab], **quiet)
    widgets.queue.take_back(handlers.take_back, [], **quiet)

    widgets.new.click(handlers.new, [widgets.tab], **quiet)
    widgets.search.change(handlers.search, [widgets.search, widgets.tab], trigger_mode="always_last", **quiet)
    for name in ("open", "rename", "remove"):
        getattr(widgets.conversations, name)(getattr(handlers, name), [widgets.tab, widgets.search], **quiet)
    reading = quiet | {"concurrency_limit": MAX_ANSWERS, "concurrency_id": "reading", "trigger_mode": "multiple"}
    reads = [
        widgets.upload.upload(handlers.upload, [widgets.upload, *values], **reading),
        widgets.sample.click(handlers.sample, values, **reading),
        widgets.documents.attach(handlers.attach, values, **reading),
    ]
    widgets.documents.discard(handlers.discard, [widgets.tab], **quiet)
    widgets.notice.dismiss(handlers.dismiss, [], **quiet)

    _join_compare(handlers, widgets, values)

    listing = QUIET | {"outputs": [widgets.models]}
    widgets.top.look(handlers.look, [], **listing)
    widgets.top.cancel(handlers.cancel, [], **listing)
    widgets.models.choose(handlers.choose, [], **listing)
    widgets.thread.choose(handlers.choose, [], **listing)
    gr.on(
        [widgets.other_model.submit, widgets.use_other.click], handlers.choose_named, [widgets.other_model], **listing
    )

    _join_cards(handlers, widgets, reads, settled)


def _join_cards(handlers: Handlers, widgets: Widgets, reads: list[Any], settled: Any) -> None:
    """Connect the plugin cards. reads: events after which the weights for a document are loaded; settled: an answer is complete."""
    quiet, controls = QUIET | {"outputs": widgets.outputs}, widgets.controls
    switches = [widgets.tab, *controls.inputs]
    for card in controls.cards:
        toggled = handlers.toggled(card)
        card.switch.input(toggled, switches, **quiet)
        for field in card.fields.values():
            field.change(toggled, switches, trigger_mode="always_last", **quiet)
        if card.reset is not None:  # in the browser alone: the changed fields raise their own events
            js = f"() => {json.dumps(default_options(card.plugin))}"
            card.reset.click(None, [], list(card.fields.values()), js=js, api_visibility="private")
    if controls.no_drafter is not None:
        controls.no_drafter.input(handlers.leave_out_drafters, switches, **quiet)
    widgets.advice.switch_on(handlers.switch_on, switches, **quiet)
    states = [card.state for card in controls.cards if card.state is not None]
    planned = QUIET | {"outputs": [*widgets.planned, widgets.document_plugins, *states]}
    widgets.tab.change(handlers.replan, switches, trigger_mode="always_last", **planned)
    settled.then(handlers.replan, switches, **planned)  # the weights of the plan are loaded now
    if states:
        for read in reads:
            read.then(handlers.replan, switches, **planned)


def _join_compare(handlers: Handlers, widgets: Widgets, values: list[Any]) -> None:
    """Connect the Compare view. The run changes one widget, and has another widget than the button that cancels it."""
    view = [widgets.compare, widgets.compare_live]
    for part in (widgets.thread, widgets.advice):
        part.compare(handlers.compare, values, **QUIET, outputs=view)
    running = QUIET | {
        "outputs": [widgets.compare_live],
        "concurrency_limit": MAX_ANSWERS,
        "concurrency_id": "comparing",
    }
    ran = widgets.compare.compare_run(handlers.compare_run, [], **running)
    effects = [card.effect for card in widgets.controls.cards]
    ran.then(handlers.compare_show, [], **QUIET, outputs=[*view, *effects, widgets.advice])
    widgets.compare_live.compare_stop(handlers.compare_stop, [], **QUIET, outputs=[widgets.compare_live])


def _keep(page: Any, handlers: Handlers, widgets: Widgets, anchor: Any, kept: Any) -> None:
    """Keep the state of a tab in the browser over a reload: switches, options, sampling, documents of a new conversation."""
    inputs = [*widgets.sampling, *widgets.controls.inputs]
    pairs = list(zip(handlers.value_names, (widget.value for widget in inputs), strict=True))
    js = f"(...values) => window.pitlane.keepChanged({json.dumps(pairs)}, values)"
    gr.on([widget.change for widget in inputs], None, inputs, None, js=js, api_visibility="private")
    js = "(ids) => window.pitlane.keep({ documents: JSON.parse(ids || '[]') })"
    widgets.attached.change(None, [widgets.attached], None, js=js, api_visibility="private")
    js = "() => [null, window.pitlane.anchor, window.pitlane.kept]"
    restored = list(dict.fromkeys([*widgets.outputs, *inputs]))
    page.load(handlers.load, [widgets.tab, anchor, kept], restored, js=js, **QUIET)
