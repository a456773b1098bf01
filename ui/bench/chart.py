"""Charts of comparisons: the speeds of one report as PNG, and the speeds of every set of plugins over time as HTML with SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pitlane.ui.bench.report import speed_text
from pitlane.ui.render import short_name

if TYPE_CHECKING:
    from pitlane.storage.types import StoredComparison

MAX_SETS = 8  # of plugins in the history: those with the most comparisons
WIDTH, HEIGHT, MARGIN = 180, 30, 4  # pixels of a line of the history
COLOURS = {"faster": "#0a6e4e", "slower": "#b3261e"}
OTHER_COLOUR = "#9fb0b8"


def to_png(report: Mapping[str, Any]) -> bytes:
    """The tokens per second of every plan as bars: the median, and the range of the laps."""
    from matplotlib.figure import Figure  # takes most of a second

    plans = report["plans"]
    speeds = [plan["tokens_per_second"] for plan in plans]
    medians = [speed["median"] for speed in speeds]
    ranges = [
        [middle - speed["min"] for middle, speed in zip(medians, speeds, strict=True)],
        [speed["max"] - middle for middle, speed in zip(medians, speeds, strict=True)],
    ]
    figure = Figure(figsize=(8, 1.3 + 0.45 * len(plans)), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = [COLOURS.get(plan["outcome"], OTHER_COLOUR) for plan in plans]
    axes.barh(range(len(plans)), medians, xerr=ranges, color=colours, height=0.6, ecolor="#4f5c65", capsize=3)
    axes.set_yticks(range(len(plans)), [plan["label"] for plan in plans])
    axes.invert_yaxis()
    for row, (plan, speed) in enumerate(zip(plans, speeds, strict=True)):
        axes.annotate(
            speed_text(plan), (speed["max"], row), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, 1.35 * max([*(speed["max"] for speed in speeds), 1e-9]))
    axes.set_xlabel("tokens per second; behind the bar: how many times as fast as the first plan")
    axes.set_title(f"{short_name(report['model'])}, {report['dtype']}, {report['repeats']} laps", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def history_html(comparisons: Sequence[StoredComparison]) -> str:
    """A line per set of plugins that was compared more than once: its speeds over time, on one scale. Newest comparison first."""
    speeds: dict[str, list[float]] = {}
    for comparison in reversed(comparisons):
        for plan in comparison.report["plans"]:
            name = ", ".join(sorted(plan["plugins"])) or "no plugins"
            speeds.setdefault(name, []).append(float(plan["tokens_per_second"]["median"]))
    sets = sorted(
        ((name, values) for name, values in speeds.items() if len(values) > 1), key=lambda item: -len(item[1])
    )
    if not sets:
        return ""
    top = max(max(values) for _, values in sets) or 1.0
    rows = "".join(_history_row(name, values, top) for name, values in sets[:MAX_SETS])
    return (
        "<details class='history'><summary>Earlier comparisons of this model</summary>"
        f'<table aria-label="tokens per second of each set of plugins over time">{rows}</table></details>'
    )


def _history_row(name: str, values: Sequence[float], top: float) -> str:
    step = (WIDTH - 2 * MARGIN) / (len(values) - 1)
    points = " ".join(
        f"{MARGIN + index * step:.1f},{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top:.1f}"
        for index, value in enumerate(values)
    )
    label = f"from {values[0]:.1f} to {values[-1]:.1f} tokens a second"
    return (
        f'<tr><th scope="row">{escape(name)}</th><td><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{label}"><polyline points="{points}"/></svg></td>'
        f"<td><b>{values[-1]:.1f}</b> tok/s</td><td>{len(values)} comparisons</td></tr>"
    )
