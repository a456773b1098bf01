"""What a plugin says of itself, for its card: the group of its hooks, the bound of its exactness, its costs.

The texts come from the docstring of the plugin's module, in the form that every built-in plugin has (docs/writing-plugins.md). A
docstring of another form gives empty texts. Knows no Gradio and no plugin by name.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from pitlane import Plugin

if TYPE_CHECKING:
    from pitlane import PluginEntry

THIRD_PARTY = "Third-party"
# Groups in the order of the page. A plugin belongs to the first group whose hooks it implements.
GROUPS: dict[str, frozenset[str]] = {
    "KV cache": frozenset({"build_kv_store", "trim_cache", "match_prefix"}),
    "Weights": frozenset({"build_linear", "build_embedding", "transform_weights"}),
    "Attention and operations": frozenset({"build_attention", "build_op"}),
    "Sampling": frozenset({"adjust_logits"}),
    "Decode": frozenset({"propose", "build_runner"}),
}
ORDER = ("Decode", "KV cache", "Weights", "Attention and operations", "Sampling", "Other", THIRD_PARTY)
UNITS = {
    "tokens": "window stride num_draft_tokens num_sinks history min_tokens max_ngram min_ngram ngram",
    "layers": "num_layers",
    "inputs": "group_size",
}
_UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}
_NEXT_PART = r"(?=\s(?:Costs:|Helps\s|Paper:|Source:|Refused:|Refused,)|$)"


def group_of(entry: PluginEntry) -> str:
    """The group of a plugin: by its hooks, or `THIRD_PARTY` for a plugin that does not come with Pitlane."""
    if entry.source != "built-in":
        return THIRD_PARTY
    return next((group for group, hooks in GROUPS.items() if hooks & set(entry.hooks)), "Other")


def exactness_text(plugin: type[Plugin]) -> str:
    """What the docstring says about exactness: the class, its bound and how it was measured. Empty without such a part."""
    match = re.search(rf"\bExactness: (.*?){_NEXT_PART}", _doc(plugin))
    text = match[1].strip() if match else ""
    return "" if text.rstrip(".") in ("identical", "rounding", "approximate", "steering") else text


def costs_text(plugin: type[Plugin]) -> str:
    """What the docstring says about costs, and where the plugin helps."""
    match = re.search(r"\b(Costs: .*?)(?=\s(?:Paper:|Source:)|$)", _doc(plugin))
    return match[1].strip() if match else ""


def bound(plugin: type[Plugin]) -> str:
    """The bound of the exactness in short, with the default options: `4.4 %`, `2⁻⁸`. Empty if the docstring states no figure.

    An approximate plugin states a metric and its value, a rounding plugin a relative error.
    """
    text = exactness_text(plugin)
    value = re.search(r"\bvalue: ([\d.]+ %)", text)
    if value:
        return value[1]
    error = re.search(r"\b2\^-(\d+)", text) if plugin.exactness == "rounding" else None
    return "2⁻" + error[1].translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if error else ""


def option_unit(name: str, schema: dict[str, Any]) -> str:
    """The unit of an option: of its schema (`json_schema_extra={"unit": ...}`), else of its name. Empty without a unit."""
    return str(schema.get("unit") or _UNIT_OF.get(name, ""))


def _doc(plugin: type[Plugin]) -> str:
    return " ".join((sys.modules[plugin.__module__].__doc__ or plugin.__doc__ or "").split())
