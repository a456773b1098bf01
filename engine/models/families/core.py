"""The families that the engine knows without a plugin. This is the only list of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.families.gemma3 import GEMMA3
from pitlane.engine.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3

CORE_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA3)


def read_config(folder: Path, families: Families | None = None) -> DecoderConfig:
    """Read the config of a model folder. families: the known families (None: `CORE_FAMILIES`)."""
    return (families or Families(CORE_FAMILIES)).read(folder)[0]


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Make a config from the values of a `config.json` of a core family."""
    return Families(CORE_FAMILIES).of(raw).parse(raw)
