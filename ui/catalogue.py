"""All plugins on this machine as records, for `pitlane plugins list` and `info`.

A record is kept in PITLANE_HOME, so that a list imports no plugin: neither torch nor pydantic. A kept catalogue holds while no
version, no file and no setting changes; the catalogue of a machine with a plugin that failed is not kept, because the reason may be
outside its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pitlane
import pitlane.plugins
from pitlane import __version__, find_plugins
from pitlane.storage import certificates
from pitlane.storage.files import write_whole
from pitlane.storage.home import home, home_path

if TYPE_CHECKING:
    from pitlane import Plugin, PluginEntry

FILE = "plugins.json"


def rows(plugins_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """One record per plugin, by name. Loads the plugins only if the kept catalogue does not hold."""
    state = _state(plugins_dir)
    records = _kept(state)
    if records is None:
        from pitlane import PluginRegistry

        records = [describe(entry) for entry in PluginRegistry.load(plugins_dir)]
        if all(record["status"] in ("ok", "always on", "disabled") for record in records):
            _keep(state, records)
    for record in records:
        identity = record["name"], record["source"], record.pop("code")
        record["certificate"] = certificate(*identity)
        record["outdated_check"] = "" if record["certificate"] else outdated_check(*identity)
    return records


@lru_cache(maxsize=1024)
def code_hash(plugin: type[Plugin]) -> str:
    """A hash of the source files of a loaded plugin: of its built-in module, its installed package, or its loose file.

    Call it soon after the plugin is loaded: the first hash counts for this process, even if the files change later. The core is
    left out: a certificate names the version of Pitlane. Empty if there is no file.
    """
    parts = plugin.__module__.split(".")
    root = sys.modules.get(".".join(parts[:3]) if parts[:2] == ["pitlane", "plugins"] else parts[0])
    path = Path(getattr(root, "__file__", None) or "")
    files = sorted(path.parent.rglob("*.py")) if hasattr(root, "__path__") else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            text = file.read_bytes()
            digest.update(f"{file.relative_to(path.parent).as_posix()} {len(text)}\n".encode() + text)
    except OSError:
        return ""
    return digest.hexdigest()


def certificate(name: str, source: str, code: str) -> dict[str, Any] | None:
    """The outcome of `pitlane plugins check` for this source and code of a plugin on this machine, or None."""
    try:
        record = certificates.load(name, source, __version__, code)
    except ValueError:  # an entry point may have any name
        return None
    keys = ("declared", "passed", "proved", "model", "dtype", "bound", "num_tokens", "options", "checked_at", "broken")
    return None if record is None else {key: record.get(key) for key in keys}


def outdated_check(name: str, source: str, code: str) -> str:
    """What ended the last certificate of a plugin: `since its code changed`. Empty without a certificate, or if it holds."""
    try:
        record = certificates.latest(name)
    except ValueError:
        return ""
    if record is None:
        return ""
    if record.get("source") != source:
        return f"since the check of {record.get('source')}"
    if record.get("pitlane") != __version__:
        return f"since the check under Pitlane {record.get('pitlane')}"
    return "since its code changed" if record.get("code") != code else ""


def certificate_text(certificate: dict[str, Any]) -> str:
    """`identical, proved on this machine (CONDITIONS)`, or the reason why it is not proved.

    Conditions: model, dtype, bound, tokens of an answer, and the options that the user set for the check.
    """
    options = certificate["options"] or {}
    set_options = f", with {', '.join(f'{key}={value}' for key, value in options.items())}" if options else ""
    declared = certificate["declared"]
    if not certificate["passed"]:
        return f"declares {declared}, broken on this machine{set_options}: {'; '.join(certificate['broken'])}"
    conditions = f"{certificate['model']}, {certificate['dtype']}"
    if certificate["bound"] is not None:
        conditions += f", bound {certificate['bound']:.2g}"
    if certificate["num_tokens"]:
        conditions += f", {certificate['num_tokens']} tokens"
    proof = "proved" if certificate["proved"] else "not proved"
    return f"{declared}, {proof} on this machine ({conditions}{set_options})"


def describe(entry: PluginEntry) -> dict[str, Any]:
    """All facts about a plugin, as JSON. code: the hash that a certificate must have."""
    plugin = entry.plugin
    return {
        "name": entry.name,
        "status": "always on" if entry.serves_host and entry.status == "ok" else entry.status,
        "reason": entry.reason,
        "notes": entry.notes,
        "source": entry.source,
        "role": plugin.role if plugin else None,
        "exactness": plugin.exactness if plugin and not entry.serves_host else None,
        "api_version": plugin.api_version if plugin else "",
        "summary": plugin.summary() if plugin else "",
        "hooks": entry.hooks,
        "requires": list(plugin.requires) if plugin else [],
        "conflicts": list(plugin.conflicts) if plugin else [],
        "options": _options(plugin.Options.model_json_schema()) if plugin else [],
        "code": code_hash(plugin) if plugin else "",
    }


def _state(plugins_dir: str | Path | None) -> str:
    """Everything that a record depends on."""
    plans = Path(str(sys.modules[find_plugins.__module__].__file__)).parent
    folders = [*map(Path, pitlane.plugins.__path__), plans]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    own = [(str(path), path.stat().st_mtime_ns) for path in [*files, Path(__file__)]]
    others = [candidate.state() for candidate in find_plugins(plugins_dir)]
    return json.dumps([__version__, sys.version, os.environ.get("PITLANE_LOAD"), own, others])


def _kept(state: str) -> list[dict[str, Any]] | None:
    try:
        record = json.loads((home_path() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_valid = isinstance(record, dict) and record.get("state") == state and isinstance(record.get("rows"), list)
    return record["rows"] if is_valid else None


def _keep(state: str, records: list[dict[str, Any]]) -> None:
    try:
        write_whole(home() / FILE, json.dumps({"state": state, "rows": records}))
    except (OSError, pitlane.PitlaneError):  # without a home, every list loads the plugins
        return


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
