"""Write the loss curve of a run, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pitlane.training.files import replacing

FILE, PICTURE = "loss_curve.json", "loss_curve.png"
INTACT = "state and model are intact"
SMOOTHING = 50  # points of the moving mean; less in a run of fewer than 500 steps


def write(curve: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the points of the curve, one per step, as JSON."""
    with replacing(folder / FILE, str(folder / FILE), INTACT) as part:
        part.write_text(json.dumps(curve) + "\n", encoding="utf-8")


def draw(curve: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw training and held-out loss over the steps into a PNG."""
    from matplotlib.figure import Figure

    steps = [point["step"] for point in curve]
    losses = [point["loss"] for point in curve]
    width = max(1, min(SMOOTHING, len(losses) // 10))
    smooth = [sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, smooth, label="training", color="#2a6fdb", linewidth=1.4)
    held_out = [(point["step"], point["eval_loss"]) for point in curve if "eval_loss" in point]
    axes.plot(*zip(*held_out, strict=True), label="held out", color="#d1495b", marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with replacing(folder / PICTURE, str(folder / PICTURE), INTACT) as part:
        figure.savefig(part, dpi=120, format="png")
