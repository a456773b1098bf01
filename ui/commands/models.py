"""`pitlane models`: models on this machine, and the Hugging Face cache."""

from __future__ import annotations

import sys
from typing import Any

import click

from pitlane.ui.commands.options import as_json
from pitlane.ui.render import note, print_json, print_table, say, size


@click.group()
def models() -> None:
    """Models in the Hugging Face cache, and models that need no download."""


@models.command()
@as_json
def ls(as_json: bool) -> None:
    """List the models on this machine."""
    from pitlane import PluginRegistry
    from pitlane.models import PRESETS, cached_models

    rows: list[dict[str, Any]] = [
        {"name": model.name, "path": str(model.path), "bytes": model.num_bytes, "reason": model.reason}
        for model in cached_models(PluginRegistry.load().families)
    ]
    if as_json:
        print_json({"cached": rows, "presets": [f"random:{name}" for name in PRESETS]})
        return
    if rows:
        cells = [[row["name"], size(row["bytes"]), row["reason"] or "ready"] for row in rows]
        print_table(["model", "size", "status"], cells)
    else:
        note("no models in the Hugging Face cache; get one with: pitlane models pull ID")
    note("bundled: comes with Pitlane. random:NAME (random weights): " + ", ".join(PRESETS))


@models.command()
@click.argument("name", metavar="ID")
def pull(name: str) -> None:
    """Download a model, as owner/name."""
    from pitlane import PluginRegistry
    from pitlane.models import pull as download

    say(str(download(name, PluginRegistry.load().families)))


@models.command()
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.argument("name", metavar="ID")
def rm(yes: bool, name: str) -> None:
    """Delete a model from the Hugging Face cache, which other programs may use too."""
    from pitlane.models import remove

    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete {name} from the Hugging Face cache?", abort=True)
    say(f"removed {name}, freed {size(remove(name))}")
