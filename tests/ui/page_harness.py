"""What tests of the page's handlers share: values of widgets as the page sends them, and what a handler changed in the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

TAB = SimpleNamespace(session_hash="tab-1")
OTHER_TAB = SimpleNamespace(session_hash="tab-2")


def new_tab(conversation: str | None = None, documents: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"conversation": conversation, "documents": list(documents)}


def values(page: Any, enabled: tuple[str, ...] = ("prefix_cache",), max_tokens: int = 20) -> list[Any]:
    """Values of the sampling and plugin widgets as the page sends them."""
    plugins = [
        value
        for card in page.handlers.ui.controls.cards
        for value in (card.plugin.name in enabled, *(widget.value for widget in card.fields.values()))
    ]
    return [0, 1, max_tokens, None, "", "auto", "", "", "", *plugins]


def last(changes: Any) -> dict[Any, Any]:
    """All changes of a generator, the latest of each widget."""
    merged: dict[Any, Any] = {}
    for change in changes:
        merged |= change
    return merged


def event(**fields: Any) -> SimpleNamespace:
    """What page.js sends with an event."""
    return SimpleNamespace(**fields)


def card_of(page: Any, name: str) -> Any:
    return next(card for card in page.handlers.ui.controls.cards if card.plugin.name == name)
