"""`pitlane plugins`: all plugins on this machine, with exactness and options.

Only `check` runs a model and imports torch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from pitlane import EXACTNESS, Planner, PluginEntry, PluginRegistry, __version__
from pitlane.storage import certificates
from pitlane.storage.errors import PitlaneError
from pitlane.ui.commands.options import as_json, offline_option
from pitlane.ui.plugin_text import parse_settings
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
    rows = [describe(entry) for entry in PluginRegistry.load(plugins_dir)]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "role", "exactness", "status", "source")
    cells = [[*(row[column] or "" for column in columns), row["reason"] or row["summary"]] for row in rows]
    print_table([*columns, "summary"], cells)


@plugins.command()
@plugins_dir
@as_json
@click.argument("name")
def info(plugins_dir: str | None, as_json: bool, name: str) -> None:
    """Show one plugin and its options."""
    registry = PluginRegistry.load(plugins_dir)
    entry = registry.entries.get(name)
    if entry is None:
        known = ", ".join(entry.name for entry in registry)
        raise PitlaneError(f"unknown plugin {name!r}; known: {known}")
    row = describe(entry)
    if as_json:
        print_json(row)
        return
    click.echo(f"{row['name']}: {row['summary']}" if entry.plugin else f"{name} failed: {row['reason']}")
    for label in ("role", "source", "hooks", "requires", "conflicts"):
        value = row[label]
        if value:
            click.echo(f"  {label}: {', '.join(value) if isinstance(value, list) else value}")
    if row["exactness"]:
        click.echo(f"  exactness: {row['exactness']} ({EXACTNESS[row['exactness']]})")
    if row["options"]:
        cells = [[o["name"], o["type"], o["default"], o["range"], o["description"]] for o in row["options"]]
        print_table(["option", "type", "default", "range", "meaning"], cells)


@plugins.command()
@plugins_dir
@as_json
@click.option(
    "--model", "-m", default="random:tiny", show_default=True, metavar="M", help="The model to compare answers of."
)
@click.option("--option", "-o", "plugin_options", multiple=True, metavar="PLUGIN.KEY=VALUE",
              help="Set an option of a plugin. Repeatable.")  # fmt: skip
@click.option("--bound", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Largest mean share of the next token's probability that the plugin may move.")  # fmt: skip
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
    registry = PluginRegistry.load(plugins_dir)
    names = ",".join([name, *registry.get(name).requires])
    settings = dict(
        parse_settings(names, plugin_options, {}, registry).settings
    )  # a wrong name or option loads no model
    Planner(registry).check(settings)
    from pitlane.testing import check_plugin
    from pitlane.ui.bench.machine import machine
    from pitlane.ui.commands.model_choice import fetch

    fetch(model)
    options = settings.pop(name)
    outcome = check_plugin(name, options, bound=bound, base=settings, registry=registry, model=model, num_tokens=tokens)
    checked_at = datetime.now(UTC).isoformat(timespec="seconds")
    record = outcome.to_json() | {"pitlane": __version__, "checked_at": checked_at, "machine": machine()}
    certificates.save(name, record)
    if as_json:
        print_json(record)
    else:
        click.echo(outcome.table())
    ctx.exit(0 if outcome.passed else 1)


def describe(entry: PluginEntry) -> dict[str, Any]:
    """All facts about a plugin, as JSON."""
    plugin = entry.plugin
    return {
        "name": entry.name,
        "status": "always on" if entry.serves_host else entry.status,
        "reason": entry.reason,
        "source": entry.source,
        "role": plugin.role if plugin else None,
        "exactness": plugin.exactness if plugin and not entry.serves_host else None,
        "summary": plugin.summary() if plugin else "",
        "hooks": entry.hooks,
        "requires": list(plugin.requires) if plugin else [],
        "conflicts": list(plugin.conflicts) if plugin else [],
        "options": _options(plugin.Options.model_json_schema()) if plugin else [],
    }


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": _type(field),
            "default": field.get("default"),
            "range": _range(field),
            "description": field.get("description", ""),
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    kinds = [str(part.get("type", "any")) for part in field.get("anyOf", [field])]
    return " | ".join(kinds)


def _range(field: dict[str, Any]) -> str:
    """Bounds as an interval: `[1, 64]`, `(0, 10000]`; empty without bounds."""
    bounds = [part for part in field.get("anyOf", [field]) if any(key.endswith("imum") for key in map(str.lower, part))]
    if not bounds:
        return ""
    part = bounds[0]
    low = f"[{part['minimum']}" if "minimum" in part else f"({part.get('exclusiveMinimum', '-inf')}"
    high = f"{part['maximum']}]" if "maximum" in part else f"{part.get('exclusiveMaximum', 'inf')})"
    return f"{low}, {high}"
