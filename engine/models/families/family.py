"""A model family as data, and the table that finds the family of a `config.json`.

A family reads a `config.json` into a DecoderConfig, and knows the names of the tensors in its checkpoints. It holds no code of the
forward. The core's families (`core.py`) and the families of plugins (hook `register_models`) enter the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import FamilyFile, GenerationFile, read_json, short


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    architecture, model_type: its names in `config.json`. models: the models that people know, for the documentation. parse: makes
    a DecoderConfig from the values of a `config.json`; raises ModelError. stored_name: canonical name of a tensor or of a module
    (the names of a Llama checkpoint, see `decoder.py`) -> its name in the checkpoint.
    """

    architecture: str
    model_type: str
    models: str
    parse: Callable[[Mapping[str, Any]], DecoderConfig]
    stored_name: Callable[[str], str] = str


class Families:
    """A table of families."""

    def __init__(self, families: Iterable[Family] = ()) -> None:
        self._by_architecture: dict[str, Family] = {}
        for family in families:
            self.add(family)

    def __iter__(self) -> Iterator[Family]:
        return iter(self._by_architecture.values())

    def add(self, family: Family) -> None:
        """Add a family. Raises ValueError if its architecture or its model_type is taken."""
        for known in self:
            for name in {known.architecture, known.model_type} & {family.architecture, family.model_type}:
                raise ValueError(f"model family {name!r} is known already ({known.models}); choose another name")
        self._by_architecture[family.architecture] = family

    def of(self, raw: Mapping[str, Any]) -> Family:
        """The family of a `config.json`: `architectures` decides, without it `model_type`."""
        file = FamilyFile.of(raw)
        known = ", ".join(self._by_architecture)
        names = file.architectures or [family.architecture for family in self if family.model_type == file.model_type]
        if not names:
            raise ModelError(f"names no architecture; known: {known}")
        if names[0] not in self._by_architecture:
            raise UnsupportedModel(f"architecture {short(names[0])} is not supported; known: {known}")
        return self._by_architecture[names[0]]

    def read(self, folder: Path, generation: GenerationFile | None = None) -> tuple[DecoderConfig, Family]:
        """Read `config.json`. The eos_token_id of `generation_config.json` takes precedence.

        generation: the contents of that file, if the caller has read it.
        """
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"no config.json in {folder}; give the folder of a model in Hugging Face format")
        raw = read_json(file)
        try:
            family = self.of(raw)
            config = family.parse(raw)
        except UnsupportedModel:
            raise
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None
        ends = (generation or read_generation(folder)).eos_token_id
        return (config if ends is None else replace(config, eos_token_ids=tuple(ends))), family


def read_generation(folder: Path) -> GenerationFile:
    """Read `generation_config.json`; a folder without the file has no values."""
    file = folder / "generation_config.json"
    return GenerationFile.read(file) if file.is_file() else GenerationFile()
