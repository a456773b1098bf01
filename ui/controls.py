"""Plugin cards and their option widgets, generated from the registry and from each plugin's pydantic `Options`.

A widget follows the JSON schema of its field: bool -> Checkbox, a choice -> Dropdown, a number with two near bounds ->
Slider, any other number -> Number, the rest -> Textbox. Nothing here changes the engine: switches and options are values
that a request reads when it is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pitlane.engine.plan import Plan
from pitlane.engine.plugin import Plugin
from pitlane.engine.registry import PluginEntry, PluginRegistry
from pitlane.engine.types import BuildContext
from pitlane.ui.chat_flow import badge
from pitlane.ui.offline_gradio import gr

MAX_STEPS = 1000  # a slider over more values cannot be set by hand
ABBREVIATIONS = {
    "max": "maximum", "min": "minimum", "ngram": "n-gram", "kv": "KV",
    "ms": "(ms)", "kb": "(kB)", "mb": "(MB)", "gb": "(GB)",
}  # fmt: skip
Settings = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Card:
    """The widgets of one plugin: its switch, one widget per option, the line that says what it did."""

    plugin: type[Plugin]
    switch: Any
    fields: dict[str, Any] = field(default_factory=dict)
    effect: Any = None


class PluginControls:
    """All cards, and the settings that their values make. `inputs` is what a handler takes, in this order."""

    def __init__(self, registry: PluginRegistry, default: Plan, context: BuildContext) -> None:
        self.registry = registry
        plugins = [registry.get(name) for name in registry.togglable()]
        found = [(each.unavailable(context), each) for each in plugins]
        found.sort(key=lambda pair: (pair[0] is not None, pair[1].name))  # what cannot be switched on comes last
        self.cards = [_card(each, default.settings.get(each.name), reason) for reason, each in found]

    @property
    def inputs(self) -> list[Any]:
        return [widget for card in self.cards for widget in (card.switch, *card.fields.values())]

    def settings(self, values: Sequence[Any]) -> Settings:
        """Settings of the plugins that are on, from the values of `inputs`."""
        found: Settings = {}
        values_left = iter(values)
        for card in self.cards:
            enabled = next(values_left)
            options = {name: next(values_left) for name in card.fields}
            if enabled:
                found[card.plugin.name] = {name: value for name, value in options.items() if value is not None}
        return found

    def refusal(self, card: Card, settings: Settings) -> str | None:
        """Why a card that was just switched on cannot be, if another plugin holds its role."""
        name, role = card.plugin.name, card.plugin.role
        if role is None or name not in settings:
            return None
        holder = next((other for other in settings if other != name and self.registry.get(other).role == role), None)
        return f"{role} is held by {holder}; take it out to enable {name}" if holder else None


def option_label(name: str, schema: dict[str, Any]) -> str:
    """The title of the option's `Field`; without one, its name as people write it: `max_disk_gb` is "Maximum disk (GB)"."""
    title = str(schema.get("title") or "")
    if title and title != name.replace("_", " ").title():  # pydantic makes this one where the field has none
        return title
    label = " ".join(ABBREVIATIONS.get(word, word) for word in name.removeprefix("num_").split("_"))
    return label[:1].upper() + label[1:]


def option_widget(name: str, schema: dict[str, Any], value: Any) -> Any:
    """The widget of one option, from its JSON schema."""
    common = {
        "label": option_label(name, schema),
        "info": schema.get("description"),
        "value": value,
        "elem_classes": ["field"],
    }
    if "anyOf" in schema:  # optional: an empty widget is None
        schema = schema | next(part for part in schema["anyOf"] if part.get("type") != "null")
    kind = schema.get("type")
    if "enum" in schema:
        return gr.Dropdown(choices=schema["enum"], **common)
    if kind == "boolean":
        return gr.Checkbox(**common)
    if kind in ("integer", "number"):
        return _number_widget(schema, kind == "integer", common)
    return gr.Textbox(**common)


def _number_widget(schema: dict[str, Any], whole: bool, common: dict[str, Any]) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    step = 1 if whole else 0.01
    bounded = "minimum" in schema and "maximum" in schema and common["value"] is not None
    if bounded and (schema["maximum"] - schema["minimum"]) / step <= MAX_STEPS:
        return gr.Slider(minimum=low, maximum=high, step=step, buttons=[], **common)
    return gr.Number(minimum=low, maximum=high, precision=0 if whole else None, **common)


def _card(plugin: type[Plugin], settings: dict[str, Any] | None, reason: str | None) -> Card:
    options = settings if settings is not None else plugin.Options().model_dump()
    schemas = plugin.Options.model_json_schema().get("properties", {})
    with gr.Column(elem_classes=["card", *(["unavailable"] if reason else [])], elem_id=f"card-{plugin.name}"):
        with gr.Row(elem_classes=["card-head"]):
            switch = gr.Checkbox(
                value=settings is not None,
                interactive=reason is None,
                label=plugin.name,
                elem_id=f"switch-{plugin.name}",
                elem_classes=["switch"],
                container=False,
            )
            gr.HTML(badge(plugin.exactness), elem_classes=["card-badge"], apply_default_css=False)
        role = f" <em>{escape(plugin.role.replace('_', ' '))}</em>" if plugin.role else ""
        gr.HTML(f'<p class="summary">{escape(_sentence(plugin.summary()))}{role}</p>', apply_default_css=False)
        card = Card(plugin, switch)
        if reason:
            gr.HTML(f'<p class="summary">Unavailable: {escape(reason)}.</p>', apply_default_css=False)
        card.effect = gr.HTML("", elem_classes=["effect"], elem_id=f"effect-{plugin.name}", apply_default_css=False)
        if schemas:
            with gr.Accordion("Options", open=False, elem_classes=["card-options"]):
                card.fields = {name: option_widget(name, schema, options.get(name)) for name, schema in schemas.items()}
    return card


def _sentence(summary: str) -> str:
    """A plugin's summary without its own name before it."""
    _, colon, rest = summary.partition(": ")
    text = rest if colon else summary
    return text[:1].upper() + text[1:]


def others_html(entries: Iterable[PluginEntry]) -> str:
    """Plugins without a switch: those that failed, with their reason, and those that always serve the host."""
    entries = list(entries)
    failed = "".join(
        f'<div class="card failed"><b>{escape(entry.name)}</b><span class="badge bad">failed</span>'
        f"<p>{escape(entry.reason)}</p><small>{escape(entry.source)}</small></div>"
        for entry in entries
        if entry.status == "failed"
    )
    always = ", ".join(escape(entry.name) for entry in entries if entry.serves_host)
    return failed + (f'<p class="quiet">Always on: {always}.</p>' if always else "")


def plan_html(plan: Plan, loaded: bool) -> str:
    """What the next message will run with."""
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in plan.names)
    chips = chips or '<span class="chip none">no plugins</span>'
    more = "" if loaded else "<small>Weights are loaded for this set first.</small>"
    return f'<div class="next"><h4>Next answer</h4><p>{chips}{badge(plan.exactness())}</p>{more}</div>'


def refusal_html(message: str) -> str:
    """Why a set of plugins cannot run."""
    return f'<div class="next refused" role="alert"><h4>Not possible</h4><p>{escape(message)}</p></div>'
