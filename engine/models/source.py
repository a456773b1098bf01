"""A model before it is built: its config, its weights, and the folder of its tokenizer. `registry.resolve` finds it by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.weights import SafetensorsFolder, WeightSource, checked


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be built.

    name: the user's spelling. folder: folder of the model's files; None: the model has the byte tokenizer. stored_name: canonical
    name of a tensor or a module -> its name in `weights`.
    """

    name: str
    config: DecoderConfig
    weights: WeightSource
    folder: Path | None = None
    stored_name: Callable[[str], str] = str

    @classmethod
    def open(cls, name: str, folder: Path, families: Families) -> ModelSource:
        """Open a folder with `config.json` and safetensors. Raises ModelError if config and tensors do not fit."""
        config, family = families.read(folder)
        weights = SafetensorsFolder(folder)
        return cls(name, checked(config, weights, family.stored_name), weights, folder, family.stored_name)
