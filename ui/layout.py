"""The widgets of the page: the model menu, and three columns with conversations and documents, the thread, plugins."""

from __future__ import annotations

from typing import Any

from pitlane import Engine
from pitlane.ui.controls import PluginControls, others_html
from pitlane.ui.document_plugins import document_plugins
from pitlane.ui.offline_gradio import gr
from pitlane.ui.panels import thread_html
from pitlane.ui.plan_panel import plan_html
from pitlane.ui.sampling_panel import sampling_panel

FILE_TYPES = [".pdf", ".txt", ".md"]
# Events that page.js raises on elements with data-do.
EVENTS = (
    "open rename remove attach discard dismiss retry edit try turn_on turn_off take_out look choose cancel compare compare_run "
    "compare_stop switch_on version go_on take_back settle cancel_recipe"
)


def _html(value: str, **options: Any) -> Any:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **options)


def acting(value: str, **options: Any) -> Any:
    """HTML whose elements with data-do raise the events named in `EVENTS`."""
    names = " ".join(f"'{name}'" for name in EVENTS.split())
    return gr.HTML(
        value, js_on_load=f"window.pitlane.act(element, trigger); /* {names} */", apply_default_css=False, **options
    )


def model_menu() -> dict[str, Any]:
    """The model menu; page.js opens and closes it."""
    with gr.Column(elem_id="models", min_width=0):
        models = acting("", elem_id="model-list")
        with gr.Row(elem_id="other-model"):
            other = gr.Textbox(
                placeholder="Folder, .gguf file or Hugging Face id", label="Another model", show_label=False,
                container=False, max_lines=1, elem_id="other-name", max_length=4096,
            )  # fmt: skip
            use = gr.Button("Use", elem_id="use-other", size="sm", min_width=0)
    return {"models": models, "other_model": other, "use_other": use}


def left_column() -> dict[str, Any]:
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Conversations</h3>")
        new = gr.Button("New", elem_id="new", size="sm", min_width=0)
    search = gr.Textbox(
        placeholder="Search",
        label="Search conversations",
        show_label=False,
        container=False,
        elem_id="search",
        max_lines=1,
    )
    conversations = acting("", elem_id="conversations")
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Documents</h3>")
        upload = gr.UploadButton(
            "Add", file_types=FILE_TYPES, file_count="multiple", size="sm", elem_id="upload", min_width=0
        )
    notice = acting("", elem_id="notice")
    documents = acting("", elem_id="documents")
    serving = _html("", elem_id="document-plugins")
    sample = gr.Button("Try the sample PDF", elem_id="sample", size="sm")
    return {
        "new": new, "search": search, "conversations": conversations, "upload": upload, "documents": documents,
        "document_plugins": serving, "notice": notice, "sample": sample,
    }  # fmt: skip


def middle_column() -> dict[str, Any]:
    with gr.Column(elem_id="scroll"):
        thread = acting(thread_html([], [], {}, None), elem_id="thread")
        live = acting("", elem_id="live")
        queue = acting("", elem_id="queue")
    with gr.Column(elem_id="compare"):
        compare_live = acting("", elem_id="compare-live")
        compare = acting("", elem_id="compare-view")
    with gr.Column(elem_id="composer"):
        with gr.Row(elem_id="ask"):
            box = gr.Textbox(
                placeholder="Ask something", label="Question", show_label=False, container=False, lines=1, max_lines=8,
                elem_id="box", autofocus=True, max_length=200_000,
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


def right_column(engine: Engine) -> dict[str, Any]:
    with gr.Row(elem_classes=["titlebar"]):
        _html("<h3>Plugins</h3>")
    plan = _html(plan_html(engine.default_plan, True), elem_id="plan")
    advice = acting("", elem_id="advice")
    panel = sampling_panel(engine.loader.source.sampling)
    panel.join()
    default, context = engine.document_plan, engine.loader.build_context
    controls = PluginControls(engine.registry, default, context, document_plugins(engine, default.settings))
    others = _html(others_html(engine.registry), elem_id="others")
    return {"plan": plan, "advice": advice, "controls": controls, "sampling": panel.inputs, "others": others}
