"""Find a model by the name given to `--model`: its configuration, weights, tokenizer folder and class.

A name is `bundled`, `bundled-drafter`, `random:<preset>`, a local folder, or a Hugging Face id. A Hugging Face model comes
from the cache; if the cache is incomplete, we download the model. Finding a model builds no layer.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pitlane.engine.errors import ModelError
from pitlane.engine.models import hub
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.config_file import short
from pitlane.engine.models.llama import Llama
from pitlane.engine.models.presets import preset
from pitlane.engine.models.weights import RandomWeights, SafetensorsFolder, StoredName, WeightSource, checked

MODELS: Mapping[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "SmolLM3ForCausalLM": Llama,
}

WAY_OUT = "give a folder, a Hugging Face id, `bundled` or `random:<preset>`"
BUNDLED = {"bundled": "pitlane.storage.bundled", "bundled-drafter": "pitlane.storage.bundled.drafter"}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The result of `resolve`.

    name: the user's spelling. folder: folder of the model's files; None for a random preset. stored_name: canonical name of a
    tensor -> its name in `weights`.
    """

    name: str
    config: ModelConfig
    weights: WeightSource
    folder: Path | None = None
    stored_name: StoredName = str

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.folder


def resolve(model: str) -> ModelSource:
    """Find a model by its name. Raises ModelError; its message is one line and says how to go on."""
    if model.startswith("random:"):
        config = preset(model.removeprefix("random:"))
        return ModelSource(model, config, RandomWeights(config))
    if model in BUNDLED:
        return _from_folder(model, _bundled_folder(BUNDLED[model]))
    try:
        folder = Path(model).expanduser()
        is_folder, is_file = bool(model) and folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError):  # the name is too long, or `~user` names no user
        raise ModelError(f"no such folder: {short(model)}; {WAY_OUT}") from None
    if is_folder:
        return _from_folder(model, folder)
    if is_file:
        raise ModelError(f"{model} is a file; give the folder that holds config.json and *.safetensors")
    if _looks_like_a_path(model):
        raise ModelError(f"no such folder: {model}; {WAY_OUT}")
    return _from_folder(model, hub.fetch(model))


def build_model(config: ModelConfig, builder: Builder) -> Llama:
    """Build the model of the config's architecture. Call this function under `torch.inference_mode`."""
    return MODELS[config.architecture](config, builder)


def _from_folder(name: str, folder: Path) -> ModelSource:
    config, weights = ModelConfig.from_folder(folder), SafetensorsFolder(folder)
    return ModelSource(name, checked(config, weights), weights, folder)


def _bundled_folder(package: str) -> Path:
    folder = Path(str(importlib.resources.files(package) / "."))
    if not (folder / "config.json").is_file():
        raise ModelError("the bundled model is missing from this installation; reinstall pitlane or choose --model")
    return folder


def _looks_like_a_path(model: str) -> bool:
    return not model or model.startswith((".", "~", os.sep)) or os.sep in model.replace("/", "", 1) or "\\" in model
