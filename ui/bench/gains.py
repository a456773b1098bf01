"""Gains of plugins that a comparison measured, for the plugin cards and the advice: a plugin's latest comparison counts."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from pitlane.ui.bench.report import bought_text
from pitlane.ui.render import short_name

if TYPE_CHECKING:
    from pitlane.storage.db import Store

SEARCHED = 20  # latest comparisons of a model


class Measured(NamedTuple):
    """A measured gain: of a plugin in a plan, and the time of its comparison."""

    gain: dict[str, Any]
    plan: dict[str, Any]
    created: float


def latest_gains(store: Store, model: str) -> dict[str, Measured]:
    """The latest ablated gain of every plugin, by name of the plugin."""
    gains: dict[str, Measured] = {}
    for comparison in store.comparisons.list(SEARCHED, model):
        for plan in comparison.report["plans"]:
            for name, gain in plan["bought_ms"].items():
                gains.setdefault(name, Measured(gain, plan, comparison.created))
    return gains


def measured_gains(store: Store, model: str) -> dict[str, str]:
    """The latest ablated gain of every plugin in words, with its date and model, by name of the plugin."""
    gains: dict[str, str] = {}
    for name, measured in latest_gains(store, model).items():
        day = datetime.fromtimestamp(measured.created).strftime("%Y-%m-%d")
        gains[name] = gain_text(name, measured.gain, measured.plan, day, model)
    return gains


def gain_text(name: str, gain: dict[str, Any], plan: dict[str, Any], day: str, model: str) -> str:
    """`saved 410 ms (390 ms to 430 ms) of an answer of 128 tokens; compared on 2026-11-30, bundled`."""
    words = bought_text(name, gain).removeprefix(f"{name} ")
    return f"{words} in an answer of {plan['completion_tokens']} tokens; compared on {day}, {short_name(model)}"
