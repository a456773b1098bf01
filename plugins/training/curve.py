"""Writes the loss curve of a run, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pitlane.plugins.training.errors import TrainingError

FILE, PICTURE = "loss_curve.json", "loss_curve.png"
SMOOTHING = 50  # points of a moving mean, at most a tenth of the run


def write(curve: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the points, one a step, as JSON."""
    part = folder / f"{FILE}.part"
    try:
        part.write_text(json.dumps(curve) + "\n", encoding="utf-8")
        os.replace(part, folder / FILE)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {folder / FILE}: {error}; state and model are intact") from None


def draw(curve: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write training and evaluation loss over the steps as a PNG."""
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
    try:
        figure.savefig(folder / PICTURE, dpi=120)
    except OSError as error:
        raise TrainingError(f"cannot write {folder / PICTURE}: {error}; state and model are intact") from None
