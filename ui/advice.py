"""The plugin worth trying first on this model, by a plain rule, and its box above the plugin cards.

The rule: the plugin with the largest gain that a comparison on this machine measured with this model. Without such a comparison:
`prompt_lookup` if a document is attached, because an answer then quotes the prompt; otherwise `int8`, because a decode step is
bound by reading weights. There is no advice without a comparison if the user has turned on another plugin of the same role; a
plugin of the default plan does not count. A plugin that cannot serve the model is no candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from pitlane.ui.bench.gains import latest_gains
from pitlane.ui.render import milliseconds

if TYPE_CHECKING:
    from pitlane.storage.db import Store

WITH_DOCUMENT = ("prompt_lookup", "answers quote the document, and its drafts are copied from there")
WITHOUT_DOCUMENT = ("int8", "each token reads half the bytes of the weights; the answer may differ a little")


class Advice(NamedTuple):
    """A plugin and the reason to try it."""

    name: str
    reason: str


def gains_ms(store: Store, model: str) -> dict[str, float]:
    """The latest measured gain of every plugin that saved time beyond noise: milliseconds of an answer, by plugin."""
    gains = {name: measured.gain for name, measured in latest_gains(store, model).items()}
    return {name: float(gain["ms"]) for name, gain in gains.items() if float(gain["low"]) > 0}


def replaced_by(enabled: Collection[str], roles: Mapping[str, str | None]) -> set[str]:
    """The plugins whose role another enabled plugin fills."""
    filled = {roles[name]: name for name in enabled if roles.get(name)}
    return {name for name, role in roles.items() if filled.get(role, name) != name}


def advice(
    gains: Mapping[str, float], possible: Collection[str], has_document: bool, replaced: Collection[str] = ()
) -> Advice | None:
    """The plugin to try first. possible: plugins that can serve the model; replaced: plugins whose role another plugin fills."""
    measured = {name: ms for name, ms in gains.items() if name in possible}
    if measured:
        name = max(measured, key=lambda name: measured[name])
        return Advice(name, f"a comparison on this machine measured {milliseconds(measured[name])} saved per answer")
    choice = Advice(*(WITH_DOCUMENT if has_document else WITHOUT_DOCUMENT))
    return choice if choice.name in possible and choice.name not in replaced else None


def advice_html(choice: Advice | None, enabled: Collection[str]) -> str:
    """The box: the plugin, the reason, and a button that turns it on, or that measures it if it is on."""
    if choice is None:
        return ""
    heading, verb, target, label = "Try first:", "switch_on", choice.name, "Turn on"
    if choice.name in enabled:
        heading, verb, target, label = "It is on:", "compare", "", "Measure it"
    reason = choice.reason[:1].upper() + choice.reason[1:]
    return (
        f'<div class="advice"><p><b>{heading}</b> <code>{escape(choice.name)}</code>. <span>{escape(reason)}.</span></p>'
        f'<button type="button" data-do="{verb}" data-id="{escape(target)}">{label}</button></div>'
    )
