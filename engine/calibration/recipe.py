"""The data of a calibration: the statistics of a linear's inputs, the weights of a layer, and finished recipes.

A recipe is a folder with a safetensors file per layer and `recipe.json`. The build writes `recipe.json` last, so a folder with this
file is complete. The folder's name has a digest of everything that the tensors depend on. Knows no model class, no engine and no
plugin.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pitlane.storage.errors import PitlaneError
from pitlane.storage.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.engine.models.parts import LinearPart

INFO = "recipe.json"
STALE = 3600.0  # seconds after which no process writes to a temporary file of safetensors


class InputStats(NamedTuple):
    """The inputs X [T, K] of a linear over the calibration tokens, in float32.

    absmax: largest |x| per channel [K]. mean_square: mean x^2 per channel [K]. hessian: X^T X [K, K], or None. sample: some rows of
    X [R, K].
    """

    num_tokens: int
    absmax: Tensor
    mean_square: Tensor
    hessian: Tensor | None
    sample: Tensor


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """A layer of the dense model, for a plugin that makes a recipe.

    linears: the parts of the layer, fused as the model fuses them. stats: by the name of a part's first member. weight: returns the
    weight of a member [out, in] or of a norm [size] with its offset, in float32, after the plugins that change weights before this
    plugin. error: takes new weights for some members, and returns how much they change the layer's outputs on the residual stream:
    the squared difference of a token divided by the squared norm of this token, mean over the tokens of the first two sequences.
    """

    index: int
    linears: tuple[LinearPart, ...]
    stats: Mapping[str, InputStats]
    weight: Callable[[str], Tensor]
    error: Callable[[Mapping[str, Tensor]], float]


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """The part of a recipe that a plugin makes for a layer.

    tensors: stored in the recipe. notes: numbers for `recipe.json`. weights: new weights [out, in] by member. The next layers are
    calibrated on the outputs of the layer with these weights; without them, on the outputs of the dense layer.
    """

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class RecipeProgress:
    """A recipe that is being built. key: the `variant_key` of the plan that needs it. done: finished layers of `num_layers`.

    If is_cancelled is set, the build ends before the next sequence. A later build resumes after the finished layers.
    """

    key: tuple[str, ...]
    plugin: str = ""
    done: int = 0
    num_layers: int = 0
    is_cancelled: bool = False


class Calibrator(Protocol):
    """Builds the recipes of one model under one plan."""

    def build(
        self, plugin: Any, visit: Callable[[LayerInputs], LayerRecipe], hessians: bool = False, depends: str = ""
    ) -> Recipe:
        """Return the recipe of a plugin; build it first if it is missing.

        visit: makes the recipe of a layer; called once per layer, in order. hessians: whether the statistics include Hessians.
        depends: a text for the digest of the recipe, beside the model, the calibration text and the plugins that change weights
        before; '': the plugin's key, which covers all its options.
        """

    def recipe(self, plugin: Any, depends: str = "") -> Recipe | None:
        """Return the finished recipe of a plugin, or None."""


class Recipe:
    """A finished recipe. info: the contents of `recipe.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from None

    @property
    def name(self) -> str:
        """The plugin's name and the digest of everything that the recipe depends on."""
        return self.folder.name

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def notes(self) -> list[dict[str, Any]]:
        """The notes of every layer, in order."""
        notes: list[dict[str, Any]] = self.info["notes"]
        return notes

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None if the recipe has no tensor of this name."""
        file = self._owners.get(name)
        if file is None:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, error) from None
        return tensor

    @cached_property
    def _owners(self) -> dict[str, Path]:
        from safetensors import SafetensorError, safe_open

        owners: dict[str, Path] = {}
        try:
            for layer in range(self.info["layers"]):
                file = layer_file(self.folder, layer)
                with safe_open(str(file), framework="pt", device="cpu") as handle:
                    owners |= dict.fromkeys(handle.keys(), file)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, error) from None
        return owners


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03}.safetensors"


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step."""
    import torch
    from safetensors.torch import save_file

    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(copies, partial, dict(metadata or {}))  # safetensors refuses tensors that share memory


def is_leftover(file: Path) -> bool:
    """Whether a temporary file belongs to no running process. Its name is `.<name>.<process>`, or `.tmp...` by safetensors."""
    import psutil

    process = file.suffix.removeprefix(".")
    if not process.isdecimal():
        try:
            return file.name.startswith(".tmp") and time.time() - file.stat().st_mtime > STALE
        except OSError:  # a running process has renamed it
            return False
    return int(process) == os.getpid() or not psutil.pid_exists(int(process))


def _damaged(folder: Path, error: Exception) -> PitlaneError:
    reason = " ".join(str(error).split())[:200]
    return PitlaneError(f"the recipe {folder} is damaged ({reason}); delete this folder: the next load builds it again")
