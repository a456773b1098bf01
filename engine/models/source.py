"""A model before it is built: its config, its weights, and the folder of its tokenizer. `registry.resolve` finds it by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.families.family import Families, read_generation
from pitlane.engine.models.quantized.folder import open_weights
from pitlane.engine.models.quantized.packing import Packing
from pitlane.engine.models.weights import WeightSource, checked


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be built.

    name: the user's spelling. folder: folder of the model's files; None: the model has the byte tokenizer. stored_name: canonical
    name of a tensor or a module -> its name in `weights`. sampling: the sampling that the model's maker recommends, by the names of
    SamplingParams; the engine itself does not use it.
    """

    name: str
    config: DecoderConfig
    weights: WeightSource
    folder: Path | None = None
    stored_name: Callable[[str], str] = str
    sampling: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, folder: Path, families: Families) -> ModelSource:
        """Open a folder with `config.json` and safetensors. Raises ModelError if config and tensors do not fit."""
        generation = read_generation(folder)
        config, family = families.read(folder, generation)
        stored_name = family.stored_name
        weights = open_weights(folder, config, stored_name)
        config = checked(config, weights, stored_name)
        return cls(name, config, weights, folder, stored_name, generation.sampling)

    @property
    def packings(self) -> Mapping[str, Packing]:
        """How the linears of a quantized checkpoint are stored, by canonical name; empty: all are dense."""
        return getattr(self.weights, "packings", {})
