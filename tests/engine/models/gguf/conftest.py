"""The tokenizer of a GGUF file has tests of its own; here a byte tokenizer takes its place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from pitlane.engine.text.byte_tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def tokenizer_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def write_tokenizer(metadata: Mapping[str, object], folder: Path) -> None:
        byte_tokenizer(300).save_pretrained(folder)

    module = ModuleType("gguf_tokenizer")
    module.write_tokenizer = write_tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pitlane.engine.text.gguf_tokenizer", module)
    return module
