"""Gains of plugins that a comparison measured, for the plugin cards: the latest comparison of the model counts."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from pitlane.ui.bench.report import bought_text
from pitlane.ui.render import short_name

if TYPE_CHECKING:
    from pitlane.storage.db import Store

SEARCHED = 20  # latest comparisons of a model


def measured_gains(store: Store, model: str) -> dict[str, str]:
    """The latest ablated gain of every plugin in words, with its date and model, by name of the plugin."""
    gains: dict[str, str] = {}
    for comparison in store.comparisons.list(SEARCHED, model):
        day = datetime.fromtimestamp(comparison.created).strftime("%Y-%m-%d")
        for plan in comparison.report["plans"]:
            for name, gain in plan["bought_ms"].items():
                gains.setdefault(name, gain_text(name, gain, plan, day, model))
    return gains


def gain_text(name: str, gain: dict[str, Any], plan: dict[str, Any], day: str, model: str) -> str:
    """`bought 410 ms (390 ms to 430 ms) of an answer of 128 tokens; compared on 2026-11-30, bundled`."""
    words = bought_text(name, gain).removeprefix(f"{name} ")
    return f"{words} in an answer of {plan['completion_tokens']} tokens; compared on {day}, {short_name(model)}"
