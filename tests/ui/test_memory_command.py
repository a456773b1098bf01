"""`pitlane memory` of a context that the model cannot reach: one statement, the engine's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from pitlane import BadOption
from pitlane.ui.cli import main


def memory(*args: str) -> str:
    result = CliRunner().invoke(main, ["memory", "random:tiny", "--dtype", "float32", *args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_context_beyond_the_model_does_not_fit(make_engine: Callable[..., Any]) -> None:
    needs = json.loads(memory("--context", "32k", "--json"))
    assert needs["fits"] is False and (needs["max_context"], needs["max_batch"]) == (4096, 0)
    text = memory("--context", "32k")
    assert "does not fit: the model was made for a context of at most 4,096" in text
    assert " fits " not in text
    with pytest.raises(BadOption, match=r"context must be in \[2, 4096\]"):
        make_engine(context=32768)


def test_the_longest_context_that_it_names_fits(make_engine: Callable[..., Any]) -> None:
    longest = json.loads(memory("--context", "32k", "--json"))["max_context"]
    needs = json.loads(memory("--context", str(longest), "--json"))
    assert needs["fits"] is True and needs["max_batch"] >= 1
    assert make_engine(context=longest).loader.context == longest
