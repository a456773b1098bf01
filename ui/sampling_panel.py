"""The sampling widgets of the page: presets, a reset, and a field per parameter.

An empty field takes the default of the model or of Pitlane (ui/sampling.py). A preset sets the fields in the browser alone; a
request reads them when it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pitlane.ui.offline_gradio import gr
from pitlane.ui.sampling import chat_words

THINKING: dict[str, bool | None] = {"auto": None, "on": True, "off": False}
DEFAULT_MAX_TOKENS = 512
# Names of the widgets, in the order in which handlers receive their values.
NAMES = (
    "temperature", "top_p", "max_tokens", "seed", "system", "thinking", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # the fields of a preset
# A preset names the fields that it fills; its other fields become empty.
PRESETS: dict[str, Mapping[str, str]] = {
    "Precise": {"temperature": "0"},
    "Balanced": {"temperature": "0.7", "top_p": "0.9", "repetition_penalty": "1.1"},
    "Creative": {"temperature": "1", "top_p": "0.95", "min_p": "0.05", "repetition_penalty": "1.1"},
}


@dataclass(slots=True)
class SamplingPanel:
    """fields: by the names of `NAMES`. presets: a button for each preset. reset: a button that restores every default."""

    fields: dict[str, Any]
    presets: dict[str, Any]
    reset: Any

    @property
    def inputs(self) -> list[Any]:
        """The widgets in the order of `NAMES`."""
        return [self.fields[name] for name in NAMES]

    def join(self) -> None:
        """Connect the buttons."""
        numbers = [self.fields[name] for name in NUMBERS]
        for name, button in self.presets.items():
            values = [PRESETS[name].get(field, "") for field in NUMBERS]
            button.click(None, [], numbers, js=f"() => {json.dumps(values)}", api_visibility="private")
        kept = [name for name in NAMES if name != "system"]  # a text that took thought is not thrown away
        values = [self.fields[name].value for name in kept]
        widgets = [self.fields[name] for name in kept]
        self.reset.click(None, [], widgets, js=f"() => {json.dumps(values)}", api_visibility="private")


def sampling_panel(recommended: Mapping[str, float]) -> SamplingPanel:
    """Make the widgets. recommended: values of the model's maker."""
    with gr.Accordion("Sampling and system prompt", open=False, elem_id="sampling"):
        with gr.Row(elem_id="presets"):
            presets = {name: gr.Button(name, size="sm", min_width=0) for name in PRESETS}
            reset = gr.Button("Reset", size="sm", min_width=0, elem_classes=["reset-sampling"])
        fields: dict[str, Any] = {
            "temperature": _field(
                "Temperature",
                f"empty: {chat_words(recommended)} in a chat; 0 (always the likeliest token) with documents",
            ),
            "top_p": _field("Top-p", "draw from the likeliest tokens that together have this probability"),
            "top_k": _field("Top-k", "number of tokens to draw from"),
            "min_p": _field(
                "Min-p", "leave out tokens less likely than this share of the likeliest token's probability"
            ),
            "repetition_penalty": _field("Repetition penalty", "above 1: fewer repeated words"),
            "max_tokens": gr.Number(
                value=DEFAULT_MAX_TOKENS, minimum=1, maximum=100_000, precision=0, label="Max tokens",
                info="longest answer",
            ),
            "seed": _field("Seed", "empty: random"),
            "system": gr.Textbox(
                value="", lines=2, max_lines=6, label="System prompt", info="placed after the documents in the prompt"
            ),
            "thinking": gr.Dropdown(list(THINKING), value="auto", label="Thinking", info="for models that can reason first"),
        }  # fmt: skip
    return SamplingPanel(fields, presets, reset)


def _field(label: str, info: str) -> Any:
    """A field that may stay empty; Gradio turns an empty number into 0."""
    return gr.Textbox(value="", max_lines=1, label=label, info=info)
