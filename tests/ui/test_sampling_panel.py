"""The sampling widgets of the page: presets, what is read from the fields, the list of shortcuts."""

from __future__ import annotations

from typing import Any

import pytest

from pitlane import BadOption
from pitlane.ui.model_menu import SHORTCUTS, shortcuts_html
from pitlane.ui.sampling import Sampling
from pitlane.ui.sampling_panel import NAMES, PRESETS
from tests.ui.page_harness import values


def typed(page: Any, **fields: Any) -> list[Any]:
    now = values(page)
    for name, value in fields.items():
        now[NAMES.index(name)] = value
    return now


def test_every_preset_has_values_that_the_engine_takes(page: Any) -> None:
    fields = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), "")
    found = {
        name: page.handlers.read(typed(page, **fields | dict(preset))).sampling for name, preset in PRESETS.items()
    }
    assert found["Precise"].greedy().temperature == 0
    assert 0 < found["Balanced"].greedy().temperature < found["Creative"].greedy().temperature
    assert found["Creative"].greedy().min_p == 0.05


def test_fields_are_read_as_they_are_typed_and_empty_fields_have_their_defaults(page: Any) -> None:
    ask = page.handlers.read(typed(page, top_k=" 40 ", min_p="0.1", repetition_penalty="1.2", temperature="0.5"))
    params = ask.sampling.greedy()
    assert (params.top_k, params.min_p, params.repetition_penalty, params.temperature) == (40, 0.1, 1.2, 0.5)
    assert "top_k" not in page.handlers.read(values(page)).sampling.given
    for wrong in ({"top_k": "many"}, {"min_p": "x"}, {"repetition_penalty": "0"}, {"top_k": "-1"}):
        with pytest.raises(BadOption):
            page.handlers.read(typed(page, **wrong))
    assert isinstance(ask.sampling, Sampling)


def test_every_shortcut_is_listed() -> None:
    html = shortcuts_html()
    assert all(meaning in html for meaning in SHORTCUTS.values()) and "<kbd>Alt</kbd> + <kbd>N</kbd>" in html
