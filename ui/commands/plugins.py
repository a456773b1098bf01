"""`pitlane plugins`: all plugins on this machine, with exactness and options; check, disable, or begin a plugin.

Only `check` runs a model and imports torch. `disable` and `enable` load no plugin.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pitlane.storage import certificates
from pitlane.storage.errors import PitlaneError
from pitlane.ui import catalogue
from pitlane.ui.commands.options import as_json, offline_option
from pitlane.ui.render import print_json, print_table

plugins_dir = click.option(
    "--plugins-dir", type=click.Path(exists=True, file_okay=False), metavar="DIR",
    help="Also load the plugin files of this folder.",
)  # fmt: skip


@click.group()
def plugins() -> None:
    """Plugins and their options."""


@plugins.command("list")
@plugins_dir
@as_json
def list_plugins(plugins_dir: str | None, as_json: bool) -> None:
    """List all plugins that were found, and the reason for which a plugin failed."""
    rows = catalogue.rows(plugins_dir)
    if as_json:
        print_json(rows)
        return
    columns = ("name", "role", "exactness", "status", "source")
    cells = [[*(row[column] or "" for column in columns), _about(row)] for row in rows]
    print_table([*columns, "summary"], cells)


def _about(row: dict[str, Any]) -> str:
    """The reason for which a plugin did not load; or its summary, with the notes in brackets."""
    notes = f" ({'; '.join(row['notes'])})" if row["notes"] else ""
    return row["reason"] or f"{row['summary']}{notes}"


@plugins.command()
@plugins_dir
@as_json
@click.argument("name")
def info(plugins_dir: str | None, as_json: bool, name: str) -> None:
    """Show one plugin and its options."""
    from pitlane import EXACTNESS

    rows = catalogue.rows(plugins_dir)
    row = next((row for row in rows if row["name"] == name), None)
    if row is None:
        raise PitlaneError(f"unknown plugin {name!r}; known: {', '.join(row['name'] for row in rows)}")
    if as_json:
        print_json(row)
        return
    click.echo(f"{name} {row['status']}: {row['reason']}" if row["reason"] else f"{name}: {row['summary']}")
    for label in ("role", "source", "hooks", "requires", "conflicts"):
        value = row[label]
        if value:
            click.echo(f"  {label}: {', '.join(value) if isinstance(value, list) else value}")
    for note in row["notes"]:
        click.echo(f"  note: {note}")
    if row["exactness"]:
        click.echo(f"  exactness: {row['exactness']} ({EXACTNESS[row['exactness']]})")
    if row["certificate"]:
        click.echo(f"  checked: {catalogue.certificate_text(row['certificate'])}")
    if row["outdated_check"]:
        click.echo(f"  note: not checked on this machine {row['outdated_check']}; type: pitlane plugins check {name}")
    if row["options"]:
        cells = [[o["name"], o["type"], o["default"], o["range"], o["description"]] for o in row["options"]]
        print_table(["option", "type", "default", "range", "meaning"], cells)


@plugins.command()
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Write the package here instead of ./pitlane-NAME.")  # fmt: skip
@click.argument("name")
def new(into: Path | None, name: str) -> None:
    """Write the package of a new plugin: pyproject.toml, module, tests, README, CI workflow.

    The package holds a drafter that works. Install it, check it, and then change it.
    """
    from pitlane.ui import template

    texts = template.files(name)
    module = next(path for path in texts if path.startswith("pitlane_")).removesuffix(".py")
    plugin = module.removeprefix("pitlane_")
    folder = into or Path(module.replace("_", "-"))
    if folder.exists() and any(folder.iterdir()):
        raise PitlaneError(f"the folder {folder} is not empty; choose another with --into")
    taken = [row for row in catalogue.rows() if row["name"] == plugin]
    if taken:
        raise PitlaneError(f"a plugin {plugin!r} is here already ({taken[0]['source']}); choose another name")
    for path, text in texts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    click.echo(f"wrote {folder}: {', '.join(texts)}")
    click.echo(f"next: pip install -e {folder} && pitlane plugins check {plugin}")


@plugins.command()
@plugins_dir
@click.argument("name")
def disable(plugins_dir: str | None, name: str) -> None:
    """Load a plugin no more: by its name, or by the name of its package or file.

    This command loads no plugin, so it works if a plugin breaks all other commands. A plugin that shares its module with other
    plugins is disabled after the module is imported: disable the package if the import fails. A built-in plugin cannot be disabled.
    """
    from pitlane import disable_plugin

    disable_plugin(name, plugins_dir)
    click.echo(f"disabled {name}; to load it again: pitlane plugins enable {name}")


@plugins.command()
@click.argument("name")
def enable(name: str) -> None:
    """Load a disabled plugin again. This command loads no plugin."""
    from pitlane import enable_plugin

    was_disabled = enable_plugin(name)
    click.echo(f"enabled {name}" if was_disabled else f"{name} was not disabled")


@plugins.command()
@plugins_dir
@as_json
@click.option(
    "--model", "-m", default="random:tiny", show_default=True, metavar="M", help="The model to compare answers of."
)
@click.option("--option", "-o", "plugin_options", multiple=True, metavar="PLUGIN.KEY=VALUE",
              help="Set an option of a plugin. Repeatable.")  # fmt: skip
@click.option("--bound", type=click.FloatRange(0, 1, max_open=True), metavar="SHARE",
              help="Largest mean share of the next token's probability that the plugin may move, below 1.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(8, 1024), default=64, show_default=True, help="Tokens of an answer.")
@offline_option
@click.argument("name")
@click.pass_context
def check(
    ctx: click.Context,
    plugins_dir: str | None,
    as_json: bool,
    model: str,
    plugin_options: tuple[str, ...],
    bound: float | None,
    tokens: int,
    name: str,
) -> None:
    """Check one plugin against the contract, and keep the certificate: does it keep the exactness that it declares?

    A plugin that declares itself identical must give the same tokens, greedy and sampled, in float64. A rounding plugin must stay
    within twice the rounding of the core, or within --bound. An approximate plugin is proved by --bound alone. A steering plugin
    must change answers. The check also toggles the plugin, runs requests together, and runs every drafter beside it. The plugins
    that the plugin requires are on too. The page shows the certificate. Exit code 1 if the plugin breaks its promise.
    """
    from pitlane import Planner, PluginRegistry, __version__
    from pitlane.ui.plugin_text import parse_settings

    registry = PluginRegistry.load(plugins_dir)
    name = registry.get(name).name  # `name` may be a former name
    names = ",".join([name, *registry.get(name).requires])
    settings = dict(
        parse_settings(names, plugin_options, {}, registry).settings
    )  # a wrong name or option loads no model
    Planner(registry).check(settings)
    from pitlane.testing import check_plugin
    from pitlane.ui.bench.machine import machine
    from pitlane.ui.commands.model_choice import fetch

    fetch(model)
    options, code = settings.pop(name), catalogue.code_hash(registry.get(name))
    outcome = check_plugin(name, options, bound=bound, base=settings, registry=registry, model=model, num_tokens=tokens)
    checked_at = datetime.now(UTC).isoformat(timespec="seconds")
    record = outcome.to_json() | {"pitlane": __version__, "code": code, "checked_at": checked_at, "machine": machine()}
    certificates.save(name, record)
    if as_json:
        print_json(record)
    else:
        click.echo(outcome.table())
    ctx.exit(0 if outcome.passed else 1)
