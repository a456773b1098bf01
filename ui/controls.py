"""Plugin cards and their option widgets, generated from the registry and from each plugin's pydantic `Options`.

A widget follows the JSON schema of its field: bool -> Checkbox, a choice -> Dropdown, a number between two near bounds ->
Slider, any other number -> Number, anything else -> Textbox. Nothing here changes the engine: switches and options are values,
and a request reads them when it is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pitlane import BuildContext, Plan, Plugin, PluginEntry, PluginRegistry
from pitlane.ui.chat_flow import badge
from pitlane.ui.offline_gradio import gr

MAX_STEPS = 1000  # with more values, a slider cannot be set by hand
ABBREVIATIONS = {
    "max": "maximum", "min": "minimum", "ngram": "n-gram", "kv": "KV",
    "ms": "(ms)", "kb": "(kB)", "mb": "(MB)", "gb": "(GB)",
}  # fmt: skip
Settings = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Card:
    """The widgets of one plugin: its switch, a note on its last toggle, a widget per option, its effect in the last answer.

    optional: names of the options that may stay empty. state: of a plugin that serves only questions about a document (None: the
    plugin serves all questions): whether it serves the next question.
    """

    plugin: type[Plugin]
    switch: Any
    note: Any
    fields: dict[str, Any] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    effect: Any = None
    state: Any = None


class PluginControls:
    """All cards, and plugin settings from their values. A handler takes the values of `inputs`, in this order.

    default: the plan of the switches. for_documents: names of its plugins that serve only questions about a document.
    """

    def __init__(
        self, registry: PluginRegistry, default: Plan, context: BuildContext, for_documents: Sequence[str] = ()
    ) -> None:
        self.registry = registry
        plugins = [registry.get(name) for name in registry.togglable()]
        reasons = {plugin.name: plugin.unavailable(context) for plugin in plugins}
        plugins.sort(key=lambda plugin: (bool(reasons[plugin.name]), plugin.name))  # unavailable plugins come last
        self.cards = [
            _card(plugin, default.settings.get(plugin.name), reasons[plugin.name], plugin.name in for_documents)
            for plugin in plugins
        ]

    @property
    def inputs(self) -> list[Any]:
        return [widget for card in self.cards for widget in (card.switch, *card.fields.values())]

    @property
    def names(self) -> list[str]:
        """Names of `inputs`, in this order: `plugin` for a switch, `plugin.option` for an option."""
        return [
            name
            for card in self.cards
            for name in (card.plugin.name, *(f"{card.plugin.name}.{option}" for option in card.fields))
        ]

    def card(self, name: str) -> Card | None:
        return next((card for card in self.cards if card.plugin.name == name), None)

    def settings(self, values: Sequence[Any]) -> Settings:
        """Settings of the plugins that are on, from the values of `inputs`."""
        settings: Settings = {}
        remaining = iter(values)
        for card in self.cards:
            enabled = next(remaining)
            options = {name: next(remaining) for name in card.fields}
            if enabled:
                settings[card.plugin.name] = {
                    name: value
                    for name, value in options.items()
                    if value is not None and not (value == "" and name in card.optional)
                }
        return settings

    def switched(self, values: Sequence[Any], name: str, is_on: bool) -> list[Any]:
        """The values of `inputs` with one plugin on or off."""
        return [is_on if key == name else value for key, value in zip(self.names, values, strict=True)]


def option_label(name: str, schema: dict[str, Any]) -> str:
    """The title of the option's `Field`. Without a title, its name in words: `max_disk_gb` is "Maximum disk (GB)"."""
    title = str(schema.get("title") or "")
    if title and title != name.replace("_", " ").title():  # the title that pydantic makes for a field without one
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
    is_optional = "anyOf" in schema
    if is_optional:  # an empty widget means None
        schema = schema | next(part for part in schema["anyOf"] if part.get("type") != "null")
    kind = schema.get("type")
    if "enum" in schema:
        return gr.Dropdown(choices=schema["enum"], **common)
    if kind == "boolean":
        return gr.Checkbox(**common)
    if kind in ("integer", "number") and not is_optional:  # Gradio turns an empty number into 0
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


def _card(plugin: type[Plugin], settings: dict[str, Any] | None, reason: str | None, for_documents: bool) -> Card:
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
        note = gr.HTML("", elem_classes=["card-note"], elem_id=f"note-{plugin.name}", apply_default_css=False)
        role = f" <em>{escape(plugin.role.replace('_', ' '))}</em>" if plugin.role else ""
        gr.HTML(f'<p class="summary">{escape(_sentence(plugin.summary()))}{role}</p>', apply_default_css=False)
        card = Card(plugin, switch, note)
        if for_documents:
            card.state = gr.HTML("", elem_classes=["effect"], elem_id=f"state-{plugin.name}", apply_default_css=False)
        if reason:
            gr.HTML(f'<p class="summary">Unavailable: {escape(reason)}.</p>', apply_default_css=False)
        card.effect = gr.HTML("", elem_classes=["effect"], elem_id=f"effect-{plugin.name}", apply_default_css=False)
        if schemas:
            with gr.Accordion("Options", open=False, elem_classes=["card-options"]):
                card.fields = {name: option_widget(name, schema, options.get(name)) for name, schema in schemas.items()}
                card.optional = {name for name, schema in schemas.items() if "anyOf" in schema}
    return card


def _sentence(summary: str) -> str:
    """The summary of a plugin, without the plugin's name in front."""
    _, colon, description = summary.partition(": ")
    text = description if colon else summary
    return text[:1].upper() + text[1:]


def others_html(entries: Iterable[PluginEntry]) -> str:
    """Plugins without a switch: plugins that failed, with the reason, and plugins that are always on."""
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
    """The plan of the next answer."""
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in plan.names)
    chips = chips or '<span class="chip none">no plugins</span>'
    loading = "" if loaded else "<small>Weights are loaded for this set first.</small>"
    return f'<div class="next"><h4>Next answer</h4><p>{chips}{badge(plan.exactness)}</p>{loading}</div>'


def serving_html(plugins: str) -> str:
    """The line below the documents about the plugins that serve only questions about a document."""
    return f'<p class="quiet">Questions about a document are answered with {escape(plugins)}.</p>'


def state_html(is_switched_on: bool, has_document: bool) -> str:
    """The state of such a plugin, for its card."""
    if not is_switched_on:
        return ""
    if has_document:
        return '<p class="good">active: a document is attached</p>'
    return '<p class="idle">waits: it answers questions about a document</p>'


def note_html(text: str, refused: bool = False) -> str:
    """The side effect of a toggle, or the reason for which it was refused."""
    return f'<p class="{"refused" if refused else ""}" role="{"alert" if refused else "status"}">{escape(text)}</p>'


def refusal_html(message: str) -> str:
    """The reason for which a set of plugins cannot run."""
    return f'<div class="next refused" role="alert"><h4>Not possible</h4><p>{escape(message)}</p></div>'
