"""The plan of the next answer as HTML: its plugins, why it cannot run, and the notes and states at the plugin cards."""

from __future__ import annotations

from html import escape

from pitlane import Plan
from pitlane.ui.chat_flow import badge


def plan_html(plan: Plan, loaded: bool) -> str:
    """The plan of the next answer."""
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in plan.names)
    chips = chips or '<span class="chip none">no plugins</span>'
    loading = "" if loaded else "<small>Weights are loaded for this set first.</small>"
    return f'<div class="next"><h4>Next answer {badge(plan.exactness)}</h4><p>{chips}</p>{loading}</div>'


def plan_line_html(plan: Plan) -> str:
    """The plan of the next answer in one line, for screens that show no plugin cards."""
    names = ", ".join(map(escape, plan.names)) or "no plugins"
    return f'<p class="plan-line"><span>Next answer: {names}</span>{badge(plan.exactness)}</p>'


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
