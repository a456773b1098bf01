"""Icons and buttons as HTML. page.js turns a click on an element with `data-do` into the event of that name about `data-id`."""

from __future__ import annotations

from html import escape

_ICONS = {
    "copy": '<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V5a1 1 0 0 1 1-1h9"/>',
    "retry": '<path d="M4 12a8 8 0 1 0 2.5-5.8"/><path d="M4 4v5h5"/>',
    "edit": '<path d="M4 20h4L19 9l-4-4L4 16z"/>',
    "rename": '<path d="M4 20h4L19 9l-4-4L4 16z"/>',
    "remove": '<path d="M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13"/>',
    "dismiss": '<path d="M6 6l12 12M18 6L6 18"/>',
    "compare": '<path d="M4 7h11M4 12h16M4 17h7"/>',
    "file": '<path d="M6 3h8l4 4v14H6z"/><path d="M14 3v4h4M9 12h6M9 16h6"/>',
}


def icon(name: str) -> str:
    """A line icon of 24 units, drawn in the colour of the text."""
    return f'<svg viewBox="0 0 24 24" aria-hidden="true">{_ICONS[name]}</svg>'


def button(do: str, target: object, label: str, symbol: str | None = None, css: str = "tool") -> str:
    """An icon button that page.js turns into the event `do` about `target`."""
    return (
        f'<button type="button" class="{css}" data-do="{do}" data-id="{escape(str(target))}" title="{escape(label)}" '
        f'aria-label="{escape(label)}">{icon(symbol or do)}</button>'
    )


def button_text(do: str, target: object, label: str) -> str:
    """A button with words that page.js turns into the event `do` about `target`."""
    return f'<button type="button" data-do="{do}" data-id="{escape(str(target))}">{escape(label)}</button>'
