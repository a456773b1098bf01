"""Builds recipes: runs a text through a model, asks a plugin for the recipe of every layer, and keeps it under PITLANE_HOME.

A build keeps the hidden states before the next layer beside the recipe. So a build that was killed resumes at its unfinished layer,
and the result is the same bit for bit. The folder `recipes/<plugin>-<digest>` depends on the weights, the config, the tokens, the
plugin with its options, and the plugins that change weights before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pitlane.engine.calibration.kept import recipes_path, trim_recipes
from pitlane.engine.calibration.recipe import (
    INFO,
    LayerInputs,
    LayerRecipe,
    Recipe,
    RecipeProgress,
    is_leftover,
    layer_file,
    save,
)
from pitlane.engine.calibration.text import calibration_hash, calibration_text
from pitlane.engine.calibration.walk import LayerWalk
from pitlane.engine.errors import BadOption, EngineClosed, ModelError
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Transform
from pitlane.engine.models.source import ModelSource
from pitlane.engine.plan.plan import Plan
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.engine.variants import transform_of
from pitlane.storage.files import write_whole
from pitlane.storage.home import cache_limit

log = logging.getLogger("pitlane")
FORMAT = "1"  # increase it when the meaning of a recipe changes
LENGTH = 512  # tokens of a calibration sequence
SEQUENCES_OF_ERROR = 2  # sequences on which `LayerInputs.error` measures
PAUSE = 10.0  # seconds between two lines of progress
STATE = "hidden-{:03}.safetensors"  # the hidden states before a layer, while a recipe is built


class ModelCalibrator:
    """The `Calibrator` of a model under a plan.

    is_stopped: called between two sequences; if it returns True, the build ends, and a later build resumes it. progress: kept up to
    date by a build, which ends if it is cancelled.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        context: BuildContext,
        is_stopped: Callable[[], bool] = lambda: False,
        progress: RecipeProgress | None = None,
    ) -> None:
        self.source, self.plan, self.context, self.is_stopped = source, plan, context, is_stopped
        self.progress = progress or RecipeProgress(plan.variant_key)
        self._recipes: dict[Path, Recipe] = {}
        self._folders: dict[tuple[str, str], Path] = {}  # by the plugin's key and `depends`

    def build(
        self, plugin: Any, visit: Callable[[LayerInputs], LayerRecipe], hessians: bool = False, depends: str = ""
    ) -> Recipe:
        finished = self.recipe(plugin, depends)
        if finished is not None:
            return finished
        cache_limit()  # refuses a wrong PITLANE_CACHE_GB before the build, not after it
        ids = self._tokens(plugin)
        build = _Build(
            self.source, self._folder(plugin, depends), plugin.name, self.is_stopped, hessians, self.progress
        )
        build.run(self._transform(plugin), ids, visit)
        recipe = self.recipe(plugin, depends)
        assert recipe is not None, "the build wrote the recipe"
        trim_recipes(recipe.folder)
        return recipe

    def recipe(self, plugin: Any, depends: str = "") -> Recipe | None:
        folder = self._folder(plugin, depends)
        if not (folder / INFO).is_file():
            self._recipes.pop(folder, None)  # another process has deleted it
            return None
        if folder not in self._recipes:
            self._recipes[folder] = Recipe(folder)
            with suppress(OSError):
                os.utime(folder)  # `kept.py` deletes the least recently used recipes
        return self._recipes[folder]

    def _before(self, plugin: Any) -> Plan:
        """The plan of the plugins that change weights before a plugin."""
        place = (plugin.stage, plugin.name)
        hooks = [hook for hook in self.plan.hook("transform_weights") if hook.plugin.name != plugin.name]
        if plugin.role != "linear":  # a linear plugin builds after all hooks `transform_weights`
            hooks = [hook for hook in hooks if (hook.plugin.stage, hook.plugin.name) < place]
        return Plan(tuple(hook.plugin for hook in hooks), {"transform_weights": tuple(hooks)} if hooks else {})

    def _transform(self, plugin: Any) -> Transform | None:
        return transform_of(self._before(plugin), self.context)

    def _folder(self, plugin: Any, depends: str) -> Path:
        key = (plugin.key, depends)
        if key not in self._folders:
            self._folders[key] = self._folder_of(plugin, depends)
        return self._folders[key]

    def _folder_of(self, plugin: Any, depends: str) -> Path:
        parts = [
            FORMAT,
            self.context.fingerprint(),
            repr(self.source.config),
            *(earlier.key for earlier in self._before(plugin).plugins),
            depends or plugin.key,
            calibration_hash(plugin.options.text),
            str(plugin.options.tokens),
            str(LENGTH),
        ]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(4, "little") + part.encode())
        return recipes_path() / f"{plugin.name}-{digest.hexdigest()[:24]}"

    def _tokens(self, plugin: Any) -> Tensor:
        """Calibration tokens [S, T]: the first tokens of the text, cut into sequences of equal length."""
        ids = Tokenizer(self.source).encode(calibration_text(plugin.options.text), add_special_tokens=False)
        ids = ids[: plugin.options.tokens]
        length = min(LENGTH, self.source.config.max_position, len(ids))
        if len(ids) < 16:
            raise BadOption(f"{plugin.name} needs a calibration text of at least 16 tokens, got {len(ids)}")
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class _Build:
    """Builds one recipe in its folder."""

    def __init__(
        self,
        source: ModelSource,
        folder: Path,
        label: str,
        is_stopped: Callable[[], bool],
        hessians: bool,
        progress: RecipeProgress,
    ) -> None:
        self.progress = progress
        self.source, self.folder, self.label, self.hessians = source, folder, label, hessians
        self.is_stopped, self.last_line = is_stopped, 0.0

    def run(self, transform: Transform | None, ids: Tensor, visit: Callable[[LayerInputs], LayerRecipe]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        began = time.monotonic()
        with torch.inference_mode():
            walk = LayerWalk(self.source, transform)
            first, hidden, notes = self._state()
            if hidden is None:
                log.warning(
                    "%s: building its recipe for %s; later loads read this recipe", self.label, self.source.name
                )
                hidden = walk.embed(ids)
            layers = walk.config.num_layers
            for index in range(first, layers):
                self._tell(index, layers, ids.numel())
                hidden, note = self._layer(walk, index, hidden, visit)
                notes.append(note)
                self._keep(index + 1, hidden, notes)
        info = {
            "plugin": self.label,
            "model": self.source.name,
            "layers": layers,
            "tokens": ids.numel(),
            "seconds": round(time.monotonic() - began, 1),
            "notes": notes,
        }
        write_whole(self.folder / INFO, json.dumps(info))
        for file in (*self.folder.glob("hidden-*"), *filter(is_leftover, self.folder.glob(".*"))):
            file.unlink(missing_ok=True)

    def _layer(
        self, walk: LayerWalk, index: int, hidden: Tensor, visit: Callable[[LayerInputs], LayerRecipe]
    ) -> tuple[Tensor, dict[str, Any]]:
        outputs, stats = walk.gather(index, hidden, self.hessians, self._check)
        if not bool(outputs.isfinite().all()):
            raise ModelError(
                f"layer {index} of {self.source.name} computes outputs that are not finite; check its weights"
            )
        error = partial(walk.error, index, hidden[:SEQUENCES_OF_ERROR], outputs[:SEQUENCES_OF_ERROR])
        layer_recipe = visit(LayerInputs(index, walk.linears[index], stats, walk.weight, error))
        del stats
        save(layer_recipe.tensors, layer_file(self.folder, index))
        if layer_recipe.weights:
            del outputs
            outputs = walk.run_with(index, hidden, layer_recipe.weights, self._check)
        return outputs, dict(layer_recipe.notes)

    def _state(self) -> tuple[int, Tensor | None, list[dict[str, Any]]]:
        """The next layer to build, the hidden states before it, and the notes of the finished layers."""
        from safetensors import SafetensorError, safe_open

        for file in sorted(self.folder.glob("hidden-*.safetensors"), reverse=True):
            try:
                with safe_open(str(file), framework="pt", device="cpu") as handle:
                    notes = json.loads(handle.metadata()["notes"])
                    return len(notes), handle.get_tensor("hidden").clone(), notes
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                log.warning("%s: %s is damaged; starting at an earlier layer", self.label, file)
        return 0, None, []

    def _keep(self, layer: int, hidden: Tensor, notes: list[dict[str, Any]]) -> None:
        save({"hidden": hidden}, self.folder / STATE.format(layer), {"notes": json.dumps(notes)})
        (self.folder / STATE.format(layer - 1)).unlink(missing_ok=True)

    def _check(self) -> None:
        if self.progress.is_cancelled:
            raise ModelError(
                f"{self.label}: its recipe was cancelled behind layer {self.progress.done} of {self.progress.num_layers}; the "
                "finished layers are kept, and the next question with this plugin goes on from there"
            )
        if self.is_stopped():
            raise EngineClosed(f"{self.label}: its recipe is half built, and goes on at the next start")

    def _tell(self, done: int, layers: int, tokens: int) -> None:
        self.progress.plugin, self.progress.done, self.progress.num_layers = self.label, done, layers
        if time.monotonic() - self.last_line > PAUSE:
            self.last_line = time.monotonic()
            log.warning("%s: layer %d of %d, %d tokens", self.label, done + 1, layers, tokens)
