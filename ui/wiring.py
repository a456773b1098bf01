"""Which event of which widget calls which handler. `join` connects the events of a tab, `keep` keeps its state over a reload."""

from __future__ import annotations

import json
from typing import Any

from pitlane.ui.handlers import Handlers
from pitlane.ui.offline_gradio import gr
from pitlane.ui.option_widgets import default_options
from pitlane.ui.page_server import MAX_ANSWERS
from pitlane.ui.page_view import Widgets

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def join(page: Any, handlers: Handlers, widgets: Widgets) -> None:
    """Connect events to handlers. Handlers that answer or read may run at the same time; all others take milliseconds.

    No event draws an unfinished answer: page.js does, and raises `settle` when the answer is over. In one tab several questions
    may run at once (`multiple`), because every conversation has its own answer.
    """
    quiet, shown = QUIET | {"outputs": widgets.outputs}, QUIET | {"outputs": widgets.shown}
    asking = shown | {"concurrency_limit": MAX_ANSWERS, "concurrency_id": "answers", "trigger_mode": "multiple"}
    values = [widgets.tab, *widgets.sampling, *widgets.controls.inputs]

    page.unload(handlers.close)
    asked = gr.on([widgets.box.submit, widgets.send.click], handlers.ask, [widgets.box, *values], **asking)
    asked.then(handlers.put_back, [widgets.box], [widgets.box], trigger_mode="multiple", **QUIET)
    for name in ("retry", "edit", "go_on", "take_out"):
        getattr(widgets.thread, name)(getattr(handlers, name), values, **asking)
    for name in ("turn_on", "turn_off"):  # they change a card
        getattr(widgets.thread, name)(getattr(handlers, name), values, **asking | quiet)
    getattr(widgets.thread, "try")(handlers.try_sample, values, **asking)
    settled = widgets.live.settle(handlers.settle, [widgets.tab], **shown)
    widgets.live.cancel_recipe(handlers.cancel_recipe, [], outputs=[widgets.live], **QUIET)
    widgets.stop.click(handlers.stop, [], **shown)
    widgets.thread.version(handlers.version, [widgets.tab], **shown)
    widgets.queue.take_back(handlers.take_back, [], **shown)

    widgets.new.click(handlers.new, [widgets.tab], **shown)
    widgets.search.change(handlers.search, [widgets.search, widgets.tab], trigger_mode="always_last", **shown)
    for name in ("open", "rename", "remove"):
        getattr(widgets.conversations, name)(getattr(handlers, name), [widgets.tab, widgets.search], **shown)
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


def keep(page: Any, handlers: Handlers, widgets: Widgets, anchor: Any, kept: Any) -> None:
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
