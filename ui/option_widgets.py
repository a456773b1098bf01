"""The widgets of a plugin's options, from its pydantic `Options`.

A widget follows the JSON schema of its field: bool -> Checkbox, a choice -> Dropdown, a number between two near bounds ->
Slider, any other number -> Number, anything else -> Textbox.
"""

from __future__ import annotations

from typing import Any

from pitlane import Plugin
from pitlane.ui.offline_gradio import gr
from pitlane.ui.plugin_about import option_unit

MAX_STEPS = 1000  # with more values, a slider cannot be set by hand
ABBREVIATIONS = {
    "max": "maximum", "min": "minimum", "ngram": "n-gram", "kv": "KV",
    "ms": "(ms)", "kb": "(kB)", "mb": "(MB)", "gb": "(GB)",
}  # fmt: skip


def option_label(name: str, schema: dict[str, Any]) -> str:
    """The title of the option's `Field`. Without a title, its name in words: `max_disk_gb` is "Maximum disk (GB)"."""
    title = str(schema.get("title") or "")
    if title and title != name.replace("_", " ").title():  # the title that pydantic makes for a field without one
        return title
    label = " ".join(ABBREVIATIONS.get(word, word) for word in name.removeprefix("num_").split("_"))
    return label[:1].upper() + label[1:]


def _with_unit(label: str, unit: str) -> str:
    return label if not unit or unit in label.lower() else f"{label} ({unit})"


def option_widget(name: str, schema: dict[str, Any], value: Any) -> Any:
    """The widget of one option, from its JSON schema."""
    common = {
        "label": _with_unit(option_label(name, schema), option_unit(name, schema)),
        "info": schema.get("description"),
        "value": value,
        "elem_classes": ["field"],
    }
    is_optional = "anyOf" in schema
    if is_optional:  # an empty widget means None
        schema = schema | next(part for part in schema["anyOf"] if part.get("type") != "null")
    kind = schema.get("type")
    if "enum" in schema:
        return gr.Dropdown(choices=schema["enum"], **common)
    if kind == "boolean":
        return gr.Checkbox(**common)
    if kind in ("integer", "number") and not is_optional:  # Gradio turns an empty number into 0
        return _number_widget(schema, kind == "integer", common)
    return gr.Textbox(**common)


def _number_widget(schema: dict[str, Any], whole: bool, common: dict[str, Any]) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    step = 1 if whole else 0.01
    bounded = "minimum" in schema and "maximum" in schema and common["value"] is not None
    if bounded and (schema["maximum"] - schema["minimum"]) / step <= MAX_STEPS:
        return gr.Slider(minimum=low, maximum=high, step=step, buttons=[], **common)
    return gr.Number(minimum=low, maximum=high, precision=0 if whole else None, **common)


def default_options(plugin: type[Plugin]) -> list[Any]:
    """The default values of a plugin's option widgets, in their order. An option without a value is an empty text."""
    values = plugin.Options().model_dump(mode="json")
    names = plugin.Options.model_json_schema().get("properties", {})
    return ["" if values[name] is None else values[name] for name in names]
