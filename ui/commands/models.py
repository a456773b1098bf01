"""`pitlane models`: the models on this machine: fetched files, their decoded copies, and the Hugging Face cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from pitlane.ui.commands.options import as_json, offline_option
from pitlane.ui.render import note, print_json, print_table, say, size

if TYPE_CHECKING:
    from pitlane.sources import DecodedModel, RecipeFolder, WheelModel


@click.group()
def models() -> None:
    """Models on this machine, and models that need no download."""


@models.command()
@as_json
def ls(as_json: bool) -> None:
    """List the models on this machine, and SmolLM2."""
    from pitlane import PluginRegistry
    from pitlane.models import PRESETS, cached_models
    from pitlane.sources import decoded_models, recipe_folders, wheel_models
    from pitlane.storage.packed import packed_folders

    cached: list[dict[str, Any]] = [
        {"name": model.name, "path": str(model.path), "bytes": model.num_bytes, "reason": model.reason}
        for model in cached_models(PluginRegistry.load().families)
    ]
    fetched, decoded, packed, recipes = wheel_models(), decoded_models(), packed_folders(), recipe_folders()
    if as_json:
        rows = {"package_index": list(map(_wheel_row, fetched)), "decoded": list(map(_decoded_row, decoded))}
        rows |= {"packed": [folder._asdict() for folder in packed], "recipes": [folder._asdict() for folder in recipes]}
        print_json({"cached": cached} | rows | {"presets": [f"random:{name}" for name in PRESETS]})
        return
    cells = [[model.name, size(model.num_bytes), _status(model)] for model in fetched]
    cells += [[row["name"], size(row["bytes"]), row["reason"] or "ready"] for row in cached]
    cells += [[model.name, size(model.num_bytes), f"decoded copy of {model.source}"] for model in decoded]
    cells += [[folder.name, size(folder.num_bytes), f"packed copy: {folder.recipe}"] for folder in packed]
    cells += [[folder.name, size(folder.num_bytes), _use(folder)] for folder in recipes]
    print_table(["model", "size", "status"], cells)
    note("bundled: comes with Pitlane. random:NAME (random weights): " + ", ".join(PRESETS))


@models.command()
@offline_option
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model and print its file or folder: smollm2, pip:<distribution>==<version>, or a Hugging Face id (owner/name)."""
    from pitlane import PluginRegistry
    from pitlane.models import pull as download
    from pitlane.ui.commands.model_choice import fetch

    fetch(name)
    say(str(download(name, PluginRegistry.load().families)))


@models.command()
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.argument("name")
def rm(yes: bool, name: str) -> None:
    """Delete a model: smollm2, pip:<distribution>==<version>, or a Hugging Face id.

    The first two go with their decoded copies. `ls` also shows the names of decoded copies, packed copies and recipes, which can be
    deleted alone. PITLANE_CACHE_GB limits the packed copies and the recipes (8.6 without it): the least recently used go first.
    Other programs may use the Hugging Face cache too.
    """
    from pitlane.sources import (
        decoded_models,
        find_pin,
        recipe_folders,
        remove_decoded_model,
        remove_recipe,
        remove_wheel_model,
    )
    from pitlane.storage.packed import packed_folders, remove_packed

    pin = find_pin(name)
    is_decoded = any(model.name == name for model in decoded_models())
    is_packed = any(folder.name == name for folder in packed_folders())
    is_recipe = any(folder.name == name for folder in recipe_folders())
    if not yes and sys.stdin.isatty():
        place = "" if pin or is_decoded or is_packed or is_recipe else " from the Hugging Face cache"
        click.confirm(f"Delete {name}{place}?", abort=True)
    if pin is not None:
        freed = remove_wheel_model(pin)
    elif is_decoded:
        freed = remove_decoded_model(name)
    elif is_packed:
        freed = remove_packed(name)
    elif is_recipe:
        freed = remove_recipe(name)
    else:
        from pitlane.models import remove

        freed = remove(name)
    say(f"removed {name}, freed {size(freed)}")


def _status(model: WheelModel) -> str:
    if model.path is None:
        return f"not fetched: pitlane models pull {model.name} ({model.licence})"
    return "ready"


def _use(folder: RecipeFolder) -> str:
    what = f"recipe of {folder.plugin}"
    return f"{what} for {folder.model}" if folder.model else f"unfinished {what}"


def _wheel_row(model: WheelModel) -> dict[str, Any]:
    path = None if model.path is None else str(model.path)
    facts = {"licence": model.licence, "description": model.description}
    return {"name": model.name, "path": path, "bytes": model.num_bytes} | facts


def _decoded_row(model: DecodedModel) -> dict[str, Any]:
    return {"name": model.name, "path": str(model.path), "bytes": model.num_bytes, "source": model.source}
