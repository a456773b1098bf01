"""Checks of a plugin class that run no model: its texts and its options."""

from __future__ import annotations

import re
import sys

from pitlane.engine.errors import PitlaneError
from pitlane.engine.plan.plugin import EXACTNESS, Plugin
from pitlane.testing.outcome import Finding

PARTS = ("Changes in the loop:", "Changes outside the loop:")


def check_docs(plugin: type[Plugin], exactness: str) -> Finding:
    """Check that the docstring of the module or the class has its lines: the changes in the loop, the exactness, the costs."""
    doc = sys.modules[plugin.__module__].__doc__ or plugin.__doc__ or ""
    lines = [line.strip() for line in doc.strip().splitlines()]
    missing = []
    if not lines or not lines[0].endswith("."):
        missing.append("a first line that is a sentence and ends with a full stop")
    if not any(line.startswith(PARTS) for line in lines):
        missing.append(f"a line that begins with {PARTS[0]!r} or {PARTS[1]!r}")
    named = re.findall(r"^Exactness: (\w+)", "\n".join(lines), re.MULTILINE)
    if not named or not {exactness, plugin.exactness} & set(named):
        missing.append(f"a line that begins with 'Exactness: {plugin.exactness}'")
    if "Costs:" not in doc:
        missing.append("'Costs:'")
    if missing:
        return Finding("docs", "failed", f"the docstring lacks {'; '.join(missing)}")
    return Finding("docs", "passed", lines[0])


def check_options(plugin: type[Plugin]) -> Finding:
    """Check that every option has a description and a default, that bounds hold, and that values survive a round trip."""
    faults = []
    for name, field in plugin.Options.model_fields.items():
        if not field.description:
            faults.append(f"{name} has no description")
        if field.is_required():
            faults.append(f"{name} has no default")
    if not faults:
        faults = [*_faults_of_defaults(plugin), *_accepted(plugin)]
    count = len(plugin.Options.model_fields)
    if faults:
        return Finding("options", "failed", "; ".join(faults))
    return Finding("options", "passed", f"{count} options, described and checked" if count else "none")


def _faults_of_defaults(plugin: type[Plugin]) -> list[str]:
    options = plugin.parse_options({})
    faults = []
    if plugin.parse_options(options.model_dump()) != options:
        faults.append("values do not survive model_dump and parse_options")
    if plugin.key_of(options) != plugin.key_of(plugin.parse_options({})):
        faults.append("key_of gives two keys for equal options")
    if plugin.exactness_for(options) not in EXACTNESS:
        faults.append(f"exactness_for returns {plugin.exactness_for(options)!r}, no exactness class")
    return faults


def _accepted(plugin: type[Plugin]) -> list[str]:
    """The wrong values that the options accept: an unknown name, and numbers outside the bounds of their schema."""
    wrong: list[tuple[str, object]] = [("no_such_option", 1)]
    for name, schema in plugin.Options.model_json_schema().get("properties", {}).items():
        if "minimum" in schema:
            wrong.append((name, schema["minimum"] - 1))
        if "maximum" in schema:
            wrong.append((name, schema["maximum"] + 1))
    return [f"{name}={value} is accepted" for name, value in wrong if _is_accepted(plugin, name, value)]


def _is_accepted(plugin: type[Plugin], name: str, value: object) -> bool:
    try:
        plugin.parse_options({name: value})
    except PitlaneError:
        return False
    return True
