"""Fixtures of the tests of training: a tokenizer, a text and models of a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pitlane.training.models import Shape, build, read_tokenizer, write_model
from pitlane.training.tokenizer import save_tokenizer, train_tokenizer
from pitlane.training.train import DTYPES

TINY = Shape(hidden_size=32, intermediate_size=48, num_layers=2, num_kv_heads=1, head_dim=16, context=512)
WORDS = "the harbour of Lund was closed in spring and ships from north lay at anchor until ice broke".split()


@pytest.fixture(scope="session")
def make_text() -> Callable[[int], str]:
    """`make_text(characters)`: sentences of a few words, about that many characters."""

    def make(characters: int, seed: int = 0) -> str:
        rng = Random(seed)
        parts: list[str] = []
        while sum(map(len, parts)) < characters:
            parts.append(" ".join(rng.choices(WORDS, k=rng.randint(4, 9))).capitalize() + ".\n")
        return "".join(parts)

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, make_text: Callable[[int], str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(make_text(4000).split("\n"), 300), folder, TINY.context)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return read_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """Models with random weights: `tiny(seed, num_layers=4)`."""

    def make(seed: int = 0, **shape: Any) -> PreTrainedModel:
        return build(replace(TINY, **shape), tokenizer, seed)

    return make


@pytest.fixture
def written(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`written(model, name)`: write a model in float32 to the folder `name`, and return the folder."""

    def write(model: PreTrainedModel, name: str = "model") -> Path:
        write_model(model, tokenizer_folder, tmp_path / name, DTYPES["float32"])
        return tmp_path / name

    return write
