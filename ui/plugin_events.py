"""Events of the plugin cards, and the values of all option widgets: read for a question, restored after a reload."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pitlane import BadOption
from pitlane.storage.errors import PitlaneError
from pitlane.storage.types import Message
from pitlane.ui.advice import advice, advice_html, gains_ms, replaced_by
from pitlane.ui.ask import Ask, seed_of
from pitlane.ui.controls import Card
from pitlane.ui.document_plugins import described, document_plugins, in_effect
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event, warn
from pitlane.ui.page_view import View
from pitlane.ui.plan_panel import note_html, plan_html, plan_line_html, refusal_html, serving_html, state_html
from pitlane.ui.plugin_text import parse_settings
from pitlane.ui.sampling import Sampling
from pitlane.ui.sampling_panel import DEFAULT_MAX_TOKENS, NAMES, THINKING

if TYPE_CHECKING:
    from pitlane import Settings


class PluginEvents(View):
    """Events of the plugin cards, over one desk."""

    def toggled(self, card: Card) -> Callable[..., Changes]:
        """Make the handler of a card's switch and options. It shows the plan of the next message, or why there is no plan."""

        def toggle(tab: Tab, *values: Any) -> Changes:
            settings, registry = self.ui.controls.settings(values), self.desk.engine.registry
            switched_on = f"+{card.plugin.name}" if card.plugin.name in settings else None
            try:
                changed, replaced = parse_settings(switched_on, (), settings, registry)
                changes = self.next_plan(tab, changed)
            except PitlaneError as error:
                return self._refused(card, tab, settings, str(error))
            names = {replacement.old for replacement in replaced}
            off = {other.switch: False for other in self.ui.controls.cards if other.plugin.name in names}
            note = "".join(note_html(str(replacement)) for replacement in replaced)
            return {**self._notes(card, note), **off, **changes}

        return page_event(toggle)

    @page_event
    def switch_on(self, event: gr.EventData, tab: Tab, *values: Any) -> Changes:
        """Turn on the plugin of the advice, as its switch would."""
        card = self.ui.controls.card(str(event.id))
        if card is None:
            return {}
        switched = self.ui.controls.switched(values, card.plugin.name, True)
        return {card.switch: True, **self.toggled(card)(tab, *switched)}

    @page_event
    def leave_out_drafters(self, tab: Tab, *values: Any) -> Changes:
        """Turn all drafters off. The switch of no drafter stays on until a drafter is switched on."""
        drafters = {card.plugin.name for card in self.ui.controls.drafters}
        settings = {
            name: options for name, options in self.ui.controls.settings(values).items() if name not in drafters
        }
        off = {card.switch: False for card in self.ui.controls.drafters}
        notes = {card.note: "" for card in self.ui.controls.cards}
        try:
            return {**notes, **off, **self.next_plan(tab, settings)}
        except PitlaneError as error:  # another switch makes the set impossible
            warn(error)
            return {**off, **self.no_drafter(settings)}

    def _refused(self, card: Card, tab: Tab, settings: Settings, reason: str) -> Changes:
        """Show the reason at the card. Switch the plugin back if the plan is possible without the change."""
        name, notes = card.plugin.name, self._notes(card, note_html(reason, refused=True))
        is_on = name in settings
        before = {key: options for key, options in settings.items() if key != name} if is_on else {**settings, name: {}}
        with suppress(PitlaneError):
            return {**notes, **self.next_plan(tab, before), card.switch: not is_on}
        return {**notes, self.ui.plan: refusal_html(reason), **self.no_drafter(settings)}

    def _notes(self, card: Card, html: str) -> Changes:
        """Show a note at one card, and clear the notes of all other cards."""
        return {other.note: html if other is card else "" for other in self.ui.controls.cards}

    @page_event
    def replan(self, tab: Tab, *values: Any) -> Changes:
        """The tab shows another conversation, or has other documents: some plugins serve only questions about a document."""
        with suppress(PitlaneError):  # the card that made the settings impossible has said why
            return self.next_plan(tab, self.ui.controls.settings(values))
        return {}

    def next_plan(self, tab: Tab, settings: Settings) -> Changes:
        """Show the plan of the next answer, and open its lane if the weights are loaded. settings: of the switches.

        Raises PitlaneError if the settings make no plan, also if the next answer would leave a plugin out.
        """
        engine, has_document = self.desk.engine, bool(tab["documents"])
        engine.plan(settings)
        plan = engine.plan(in_effect(engine, settings, has_document))
        self.desk.prepare(plan)
        names = document_plugins(engine, settings)
        states = {
            card.state: state_html(card.plugin.name in names, has_document)
            for card in self.ui.controls.cards
            if card.state is not None
        }
        serving = serving_html(described(engine, names)) if names and has_document else ""
        return {
            self.ui.plan: plan_html(plan, engine.is_loaded(plan)),
            self.ui.plan_line: plan_line_html(plan),
            self.ui.advice: self.advice(tab, settings),
            self.ui.document_plugins: serving,
            **states,
            **self.no_drafter(settings),
        }

    def no_drafter(self, settings: Settings) -> Changes:
        """The switch of no drafter under these settings. Without drafters there is no such switch."""
        switch = self.ui.controls.no_drafter
        names = {card.plugin.name for card in self.ui.controls.drafters}
        return {} if switch is None else {switch: names.isdisjoint(settings)}

    def advice(self, tab: Tab, settings: Settings) -> str:
        """The plugin worth trying first, as HTML."""
        possible = [card.plugin.name for card in self.ui.controls.cards if card.switch.interactive is not False]
        gains: dict[str, float] = {}
        with suppress(PitlaneError):
            gains = gains_ms(self.desk.store, self.desk.engine.loader.source.name)
        chosen = [name for name in settings if name not in self.desk.engine.default_plan.names]
        replaced = replaced_by(chosen, self.desk.roles)
        return advice_html(advice(gains, possible, bool(tab["documents"]), replaced), settings)

    # ---- values

    def read(self, values: Sequence[Any], documents: Sequence[str] = (), replaced: Message | None = None) -> Ask:
        """Sampling and plugin widgets as an Ask. A retry with other plugins keeps the seed, so that answers compare.

        documents: ids of the attached documents.

        Raises BadOption for values that cannot be.
        """
        num_sampling = len(self.ui.sampling)
        typed = dict(zip(NAMES, values[:num_sampling], strict=True))
        settings = in_effect(self.desk.engine, self.ui.controls.settings(values[num_sampling:]), bool(documents))
        seed = _whole("seed", typed["seed"], "leave it empty for a random seed")
        before = replaced.stats if replaced is not None else None
        if seed is None and before and sorted(before["plugins"]) != sorted(settings):
            seed = seed_of(replaced)
        given = {
            **{name: _decimal(name, typed[name]) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
            "top_k": _whole("top_k", typed["top_k"], "leave it empty to draw from all tokens"),
            "max_tokens": int(typed["max_tokens"] or DEFAULT_MAX_TOKENS),
            "seed": seed,
        }
        sampling = Sampling({name: value for name, value in given.items() if value is not None})
        system, thinking = str(typed["system"] or "").strip() or None, THINKING[typed["thinking"]]
        return Ask(settings, sampling, system, thinking, replaced)

    @property
    def value_names(self) -> list[str]:
        """Names of the values for `read`, in this order."""
        return [*NAMES, *self.ui.controls.names]

    def restored(self, kept: Mapping[str, Any], tab: Tab) -> Changes:
        """Restore the values that the browser tab had before its reload, if they are still possible.

        Another model may have no use for a plugin: then its switch and options stay as they are.
        """
        fixed = {card.plugin.name for card in self.ui.controls.cards if card.switch.interactive is False}
        kept = {name: value for name, value in kept.items() if name.partition(".")[0] not in fixed}
        widgets = [*self.ui.sampling, *self.ui.controls.inputs]
        values = [kept.get(name, widget.value) for name, widget in zip(self.value_names, widgets, strict=True)]
        try:
            self.read(values)
            changes = self.next_plan(tab, self.ui.controls.settings(values[len(self.ui.sampling) :]))
        except (PitlaneError, TypeError, ValueError, KeyError):  # values for another model, or from another page
            return {}
        restored = {widget: kept[name] for name, widget in zip(self.value_names, widgets, strict=True) if name in kept}
        return {**restored, **changes}


def kept_by_browser(text: str | None) -> tuple[dict[str, Any], list[str]]:
    """Values of widgets and ids of documents from the text that page.js keeps; nothing from any other text."""
    try:
        kept = json.loads(text or "{}")
        return dict(kept.get("values", {})), [str(document_id) for document_id in kept.get("documents", [])]
    except (ValueError, TypeError, AttributeError):
        return {}, []


def text_kept_by_browser(text: str | None) -> str:
    """The unsent question from the text that page.js keeps; empty without a question."""
    try:
        typed = json.loads(text or "{}").get("text", "")
    except (ValueError, AttributeError):
        return ""
    return typed if isinstance(typed, str) else ""


def _decimal(name: str, value: str | float | None) -> float | None:
    """The number that was typed; None for an empty field."""
    text = _typed(value)
    try:
        return float(text) if text else None
    except ValueError:
        raise BadOption(f"{name} must be a number, got {text!r}; leave the field empty for the default") from None


def _whole(name: str, value: str | float | None, way_out: str) -> int | None:
    """The whole number that was typed; None for an empty field."""
    text = _typed(value)
    try:
        return int(text) if text else None
    except ValueError:
        raise BadOption(f"{name} must be a whole number, got {text!r}; {way_out}") from None


def _typed(value: str | float | None) -> str:
    return str("" if value is None else value).strip()
