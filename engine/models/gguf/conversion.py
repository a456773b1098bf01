"""The conversion of a GGUF model to a model folder, planned and checked before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import GenerationFile, escaped
from pitlane.engine.models.decoder import parts_of
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families, Family
from pitlane.engine.models.gguf.blocks import TensorInfo
from pitlane.engine.models.gguf.config import architecture_of, config_values, generation_values
from pitlane.engine.models.gguf.names import ROPE_FREQS, canonical, is_query_or_key
from pitlane.engine.models.gguf.reader import GGUF
from pitlane.engine.models.gguf.stream import Job
from pitlane.engine.models.parts import NormPart
from pitlane.engine.models.recorder import shapes_in


@dataclass(frozen=True, slots=True)
class Conversion:
    """config, generation: the values of the JSON files. jobs: the tensors to decode, in the order of the file to write."""

    model: GGUF
    config: dict[str, Any]
    generation: dict[str, Any]
    jobs: list[Job]

    @classmethod
    def of(cls, model: GGUF) -> Conversion:
        """Raises ModelError if the model is not supported, or its tensors are not those of its metadata."""
        values, ends = config_values(model), generation_values(model)
        try:
            family = Families(CORE_FAMILIES).of(values)
            config = family.parse(values)
            GenerationFile.of(ends, "tokenizer.ggml")
        except ModelError as error:
            raise type(error)(f"{model.files[0]}: {error}") from None
        return cls(model, values, ends, _jobs(model, config, family, _infos(model, config)))

    @property
    def dtype(self) -> str:
        return str(self.config["dtype"])


def _infos(model: GGUF, config: DecoderConfig) -> dict[str, TensorInfo]:
    """The tensors by canonical name. Raises ModelError if names or shapes are not those of the config."""
    infos = {canonical(name): info for name, info in model.tensors.items() if name != ROPE_FREQS}
    declared = shapes_in(parts_of(config))
    unknown = [info.name for name, info in infos.items() if name not in declared]
    unknown += [name for name in model.tensors if name != ROPE_FREQS and canonical(name) is None]
    _refuse_any(model, "holds tensors that its architecture does not have:", list(dict.fromkeys(unknown)))
    _refuse_any(model, "lacks tensors:", [name for name in declared if name not in infos])
    for name, shape in declared.items():
        info = infos[name]
        if info.shape != shape:
            raise ModelError(
                f"{info.file}: tensor {escaped(info.name)} must be {shape} by the metadata, got {info.shape}; download it again"
            )
    return {name: infos[name] for name in declared}


def _jobs(model: GGUF, config: DecoderConfig, family: Family, infos: Mapping[str, TensorInfo]) -> list[Job]:
    """The jobs, with the changes of llama.cpp's converter that they undo."""
    architecture = architecture_of(model)
    norms = {f"{part.name}.weight" for part in parts_of(config) if isinstance(part, NormPart)}
    return [
        Job(
            family.stored_name(name),
            info,
            config.head_dim if architecture.permutes and is_query_or_key(name) else 0,
            architecture.norm_offset if name in norms else 0.0,
        )
        for name, info in infos.items()
    ]


def _refuse_any(model: GGUF, problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = ", ".join(map(escaped, names[:3]))
        raise ModelError(f"{model.files[0]} {problem} {listed}{more}; choose another file, or download it again")
