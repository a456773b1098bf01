"""Plugin cards, generated from the registry; ui/option_widgets.py makes the widgets of their options.

Nothing here changes the engine: switches and options are values, and a request reads them when it is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pitlane import BuildContext, Plan, Plugin, PluginEntry, PluginRegistry
from pitlane.ui.catalogue import certificate, certificate_text, code_hash, outdated_check
from pitlane.ui.chat_flow import badge
from pitlane.ui.offline_gradio import gr
from pitlane.ui.option_widgets import option_widget
from pitlane.ui.plugin_about import ORDER, bound, costs_text, exactness_text, group_of
from pitlane.ui.plugin_text import unavailable

DRAFTER = "drafter"
Settings = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Card:
    """The widgets of one plugin: its switch, a note on its last toggle, a widget per option, its effect in the last answer.

    optional: names of the options that may stay empty. reset: the button that gives all options their default values (None: no
    options). state: of a plugin that serves only questions about a document (None: the plugin serves all questions): whether it
    serves the next question.
    """

    plugin: type[Plugin]
    switch: Any
    note: Any
    fields: dict[str, Any] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    reset: Any = None
    effect: Any = None
    state: Any = None


class PluginControls:
    """All cards in groups, and plugin settings from their values. A handler takes the values of `inputs`, in this order.

    A plan has at most one drafter, so `no_drafter` is a switch that is on while no drafter is. default: the plan of the switches.
    for_documents: names of its plugins that serve only questions about a document.
    """

    def __init__(
        self, registry: PluginRegistry, default: Plan, context: BuildContext, for_documents: Sequence[str] = ()
    ) -> None:
        self.registry = registry
        groups = {name: group_of(registry.entries[name]) for name in registry.togglable()}
        self.cards: list[Card] = []
        self.no_drafter: Any = None
        for group in ORDER:
            plugins = [registry.get(name) for name in groups if groups[name] == group]
            if plugins:
                self._group(group, plugins, default, context, for_documents)

    def _group(
        self,
        group: str,
        plugins: Sequence[type[Plugin]],
        default: Plan,
        context: BuildContext,
        for_documents: Sequence[str],
    ) -> None:
        """Make the cards of a group: drafters first, unavailable plugins last."""
        reasons = {plugin.name: unavailable(plugin, context) for plugin in plugins}
        ordered = sorted(plugins, key=lambda plugin: (plugin.role != DRAFTER, bool(reasons[plugin.name]), plugin.name))
        with gr.Column(elem_classes=["plugin-group"], min_width=0):
            gr.HTML(f"<h4>{escape(group)}</h4>", apply_default_css=False)
            if self.no_drafter is None and any(plugin.role == DRAFTER for plugin in plugins):
                self.no_drafter = gr.Checkbox(
                    value=default.drafter is None,
                    interactive=True,  # no event reads it, so Gradio would lock it
                    label="no drafter",
                    elem_id="switch-no-drafter",
                    elem_classes=["switch", "choice", "no-drafter"],
                    container=False,
                )
            self.cards += [
                _card(
                    plugin,
                    default.settings.get(plugin.name),
                    reasons[plugin.name],
                    plugin.name in for_documents,
                    self.registry.entries[plugin.name],
                )
                for plugin in ordered
            ]

    @property
    def drafters(self) -> list[Card]:
        """The cards of which at most one is on."""
        return [card for card in self.cards if card.plugin.role == DRAFTER]

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


def _card(
    plugin: type[Plugin], settings: dict[str, Any] | None, reason: str | None, for_documents: bool, entry: PluginEntry
) -> Card:
    options = settings if settings is not None else plugin.Options().model_dump()
    schemas = plugin.Options.model_json_schema().get("properties", {})
    with gr.Column(elem_classes=["card", *(["unavailable"] if reason else [])], elem_id=f"card-{plugin.name}"):
        with gr.Row(elem_classes=["card-head"]):
            switch = gr.Checkbox(
                value=settings is not None,
                interactive=reason is None,
                label=plugin.name,
                elem_id=f"switch-{plugin.name}",
                elem_classes=["switch", *(["choice"] if plugin.role == DRAFTER else [])],
                container=False,
            )
            gr.HTML(
                badge(plugin.exactness, bound=bound(plugin), detail=exactness_text(plugin)),
                elem_classes=["card-badge"],
                apply_default_css=False,
            )
        note = gr.HTML("", elem_classes=["card-note"], elem_id=f"note-{plugin.name}", apply_default_css=False)
        gr.HTML(about_html(plugin, entry.source) + faults_html(entry), apply_default_css=False)
        card = Card(plugin, switch, note)
        if for_documents:
            card.state = gr.HTML("", elem_classes=["effect"], elem_id=f"state-{plugin.name}", apply_default_css=False)
        if reason:
            gr.HTML(f'<p class="cannot">Cannot serve this model: {escape(reason)}.</p>', apply_default_css=False)
        card.effect = gr.HTML("", elem_classes=["effect"], elem_id=f"effect-{plugin.name}", apply_default_css=False)
        if schemas:
            with gr.Accordion("Options", open=False, elem_classes=["card-options"]):
                card.fields = {name: option_widget(name, schema, options.get(name)) for name, schema in schemas.items()}
                card.optional = {name for name, schema in schemas.items() if "anyOf" in schema}
                card.reset = gr.Button("Reset to defaults", size="sm", elem_classes=["reset"], min_width=0)
    return card


def about_html(plugin: type[Plugin], source: str = "built-in") -> str:
    """The summary of a plugin; it unfolds to the bound of its exactness, the proof on this machine, and its costs.

    source: a certificate of another source, version or code of the plugin does not count.
    """
    role = f" <em>{escape(plugin.role.replace('_', ' '))}</em>" if plugin.role and plugin.role != DRAFTER else ""
    text = f"{with_code(escape(_sentence(plugin.summary())))}{role}"
    identity = plugin.name, source, code_hash(plugin)
    last_check, since = certificate(*identity), f" {outdated_check(*identity)}".rstrip()
    command = f"declared {plugin.exactness}, not checked on this machine{since}: pitlane plugins check {plugin.name}"
    proof = certificate_text(last_check) if last_check else command
    details = [("Exactness", exactness_text(plugin)), ("Proof", proof), ("", costs_text(plugin))]
    lines = "".join(
        f"<p>{f'<b>{heading}:</b> ' if heading else ''}{with_code(escape(detail))}</p>"
        for heading, detail in details
        if detail
    )
    if not lines:
        return f'<p class="summary">{text}</p>'
    return f'<details class="about"><summary class="summary">{text}</summary>{lines}</details>'


def faults_html(entry: PluginEntry) -> str:
    """The faults of a plugin that do not stop it, for example a slow import."""
    return "".join(f'<p class="cannot">Fault: {escape(note)}.</p>' for note in entry.notes)


def with_code(html: str) -> str:
    """Escaped text of a docstring, with code between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html)


def _sentence(summary: str) -> str:
    """The summary of a plugin, without the plugin's name in front."""
    _, colon, description = summary.partition(": ")
    text = description if colon else summary
    return text[:1].upper() + text[1:]


def others_html(entries: Iterable[PluginEntry]) -> str:
    """Plugins that are not ok (failed, incompatible, disabled), with the reason, and plugins that are always on."""
    entries = list(entries)
    failed = "".join(
        f'<div class="card failed"><b>{escape(entry.name)}</b><span class="badge bad">{entry.status}</span>'
        f"<p>{escape(entry.reason)}</p><small>{escape(entry.source)}</small></div>"
        for entry in entries
        if entry.status != "ok"
    )
    always = ", ".join(escape(entry.name) for entry in entries if entry.serves_host)
    return failed + (f'<p class="quiet">Always on: {always}.</p>' if always else "")
