"""The model menu: the models to choose from, their memory, and both as HTML; the state of a change for page.js.

Knows no Gradio. A forecast needs the files of a model, so only models on this machine have a forecast. page.js turns a click on an
entry into the event `choose`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from pitlane.models import Fetchable, MemoryEstimate, cached_models, fetchable
from pitlane.storage.errors import PitlaneError
from pitlane.ui.buttons import button
from pitlane.ui.model_switch import Change, ModelSwitch
from pitlane.ui.render import short_name, size

if TYPE_CHECKING:
    from pitlane import Engine

BUNDLED = "bundled"
OFFERED = "smollm2"  # the model that the first screen offers
FAILURE_SECONDS = 120.0  # tabs that open later do not show a failure

# page.js carries them out; without a modifier they count outside text fields.
SHORTCUTS = {
    "Enter": "ask, or put the question in line behind an answer",
    "Shift Enter": "a new line in the question",
    "/": "go to the question",
    "Esc": "stop the answer; close a menu",
    "Alt N": "a new conversation",
    "Alt R": "ask the last question again",
    "Alt ←": "the earlier version of the last answer",
    "Alt →": "the later version of the last answer",
    "?": "this list",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model to choose. facts: what it is and where it comes from. is_here: its files are on this machine."""

    name: str
    title: str
    facts: str
    is_here: bool = True


@dataclass(frozen=True, slots=True)
class Forecast:
    """The memory of an entry as text. fits: whether it may be chosen."""

    text: str
    fits: bool = True


def header_html(engine: Engine, page: str) -> str:
    """The header: the name of the model opens the menu. page: the id of this page, so that page.js notices another page."""
    model = engine.loader.describe()
    name = str(model["model"])
    return (
        f'<header data-page="{escape(page)}">'
        '<button type="button" class="side" data-side="left" aria-label="Conversations and documents">☰</button>'
        '<h1><i></i>Pitlane</h1><div class="serving">'
        f'<button type="button" class="model" data-do="look" aria-haspopup="dialog" aria-expanded="false" '
        f'title="{escape(name)}: choose another model"><b>{escape(short_name(name))}</b></button>'
        f'<span class="place">{escape(model["dtype"])} on {escape(model["device"])}</span>'
        '<span class="change" role="status" hidden><span></span>'
        '<button type="button" data-do="cancel">Cancel</button></span></div>'
        '<button type="button" class="keys" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)">?</button>'
        '<button type="button" class="theme" aria-label="Light or dark" title="Light or dark"></button>'
        '<button type="button" class="side" data-side="right" aria-label="Plugins">Plugins</button>'
        '<div class="track" hidden><i></i></div>'
        f'<div class="failure" role="alert" hidden><span></span>{button("dismiss", "", "Dismiss")}</div>{shortcuts_html()}</header>'
    )


def shortcuts_html() -> str:
    """The list of keyboard shortcuts, as a dialog that page.js opens."""
    rows = "".join(
        f"<tr><th>{' + '.join(f'<kbd>{key}</kbd>' for key in keys.split())}</th><td>{meaning}</td></tr>"
        for keys, meaning in SHORTCUTS.items()
    )
    close = '<form method="dialog"><button>Close</button></form>'
    heading = "<h2>Keyboard shortcuts</h2>"
    return f'<dialog class="shortcuts" aria-label="Keyboard shortcuts">{heading}<table>{rows}</table>{close}</dialog>'


def entries(switch: ModelSwitch) -> list[Entry]:
    """The models to choose from: bundled, models with a short name, the Hugging Face cache, models served before."""
    result = [Entry(BUNDLED, "Bundled model", "a demonstration, comes with Pitlane")]
    result += [
        Entry(model.name, model.title, ", ".join(filter(None, _facts(model))), model.is_here) for model in fetchable()
    ]
    result += [
        Entry(model.name, model.name, f"{size(model.num_bytes)}, Hugging Face cache")
        for model in cached_models(switch.engine.registry.families)
        if model.supported
    ]
    known = {entry.name for entry in result}
    result += [Entry(name, short_name(name), name) for name in reversed(switch.used) if name not in known]
    return result


def forecast(switch: ModelSwitch, entry: Entry) -> Forecast:
    """The memory that a model takes beside, or in place of, the model that answers."""
    try:
        needs = switch.estimate(entry.name)
    except PitlaneError as error:
        return Forecast(f"cannot run: {error}", fits=False)
    return _judged(needs, switch)


def _judged(needs: MemoryEstimate, switch: ModelSwitch) -> Forecast:
    free, total = needs.free_bytes, needs.total_bytes
    if total <= free:
        return Forecast(f"needs {size(total)}, {size(free)} free")
    if total <= free + switch.own_bytes:
        return Forecast(
            f"needs {size(total)}: {short_name(switch.name)} is closed first, and nothing answers meanwhile"
        )
    return Forecast(f"does not fit: needs {size(total)}, {size(free + switch.own_bytes)} free", fits=False)


def panels(switch: ModelSwitch) -> Iterator[str]:
    """The panel without forecasts, then with them: an estimate takes up to a second for a large model."""
    models = entries(switch)
    yield panel_html(models, {}, switch)
    yield panel_html(models, {entry.name: forecast(switch, entry) for entry in models if entry.is_here}, switch)


def panel_html(models: list[Entry], forecasts: Mapping[str, Forecast], switch: ModelSwitch) -> str:
    """The list of models."""
    items = "".join(_entry_html(entry, forecasts.get(entry.name), switch) for entry in models)
    reason = switch.change.reason if switch.change is not None else ""
    problem = f'<p class="problem">{escape(reason)}</p>' if reason else ""
    return f'<h3>Model</h3>{problem}<div class="model-list">{items}</div>'


def _entry_html(entry: Entry, judged: Forecast | None, switch: ModelSwitch) -> str:
    is_current = entry.name == switch.name
    refused = judged is not None and not judged.fits and not is_current
    action = "answers now" if is_current else "" if entry.is_here else f"fetch {entry.facts.split(',')[0]}"
    memory = judged.text if judged else "memory: a moment" if entry.is_here else "memory: known when it is here"
    return (
        f'<button type="button" class="model-choice" data-do="choose" data-id="{escape(entry.name)}" '
        f'title="{escape(entry.name)}"{" disabled" if refused or is_current else ""}{current(is_current)}>'
        f"<b>{escape(entry.title)}</b><em>{escape(action)}</em>"
        f'<small>{escape(entry.facts)}</small><small class="{"bad" if refused else ""}">{escape(memory)}</small></button>'
    )


def current(is_current: bool) -> str:
    return ' aria-current="true"' if is_current else ""


def offer_html(switch: ModelSwitch) -> str:
    """The line of the first screen that offers SmolLM2; empty if another model answers, or if a change is running."""
    if switch.name != BUNDLED or switch.exchange is None or switch.running is not None:
        return ""
    model = next((model for model in fetchable() if model.name == OFFERED), None)
    if model is None:
        return ""
    label = f"Use {model.title}" if model.is_here else f"Get {model.title} ({_megabytes(model)})"
    terms = "" if model.is_here else f" {model.licence}, from {model.origin}."
    return (
        f'<p class="offer"><span>The bundled model is a demonstration; {escape(model.title)} writes better answers.'
        f'{escape(terms)}</span><button type="button" data-do="choose" data-id="{escape(model.name)}">{escape(label)}</button></p>'
    )


def state_of(switch: ModelSwitch) -> dict[str, Any]:
    """The state of the change for page.js. text and brief: a line, and a few words; share: of the fetch; failure: the last one."""
    change = switch.change
    if change is None:
        return {"text": "", "brief": "", "share": None, "failure": None}
    if not change.is_over:
        return {"text": change.text, "brief": change.brief, "share": change.share, "failure": None}
    return {"text": "", "brief": "", "share": None, "failure": _failure(change)}


def _failure(change: Change) -> dict[str, str] | None:
    if change.ended and time.monotonic() - change.ended > FAILURE_SECONDS:
        return None
    return {"key": change.key, "text": change.reason}


def _facts(model: Fetchable) -> tuple[str, ...]:
    return _megabytes(model), model.licence, f"from {model.origin}"


def _megabytes(model: Fetchable) -> str:
    return f"{model.num_bytes / 1e6:.0f} MB"
