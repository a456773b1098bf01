"""What the writers of checkpoints need to know of the formats that the engine reads: names, layouts of bits, tokenizers of GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pitlane.engine.calibration.calibrator import ModelCalibrator
from pitlane.engine.calibration.recipe import Recipe
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.config_file import read_json
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES
from pitlane.engine.models.gguf.names import ARCHITECTURES, PER_LAYER, ROPE_FREQS, WHOLE, is_query_or_key
from pitlane.engine.models.parts import Part, Tensors
from pitlane.engine.models.quantized.awq import ORDER as AWQ_ORDER
from pitlane.engine.models.quantized.bits import pack, unpack, words_for
from pitlane.engine.models.quantized.config import KEYS as QUANTIZATION_KEYS
from pitlane.engine.models.recorder import shapes_in
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weights import INDEX, SINGLE
from pitlane.engine.plan.planner import Planner
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.text.byte_tokenizer import byte_tokenizer
from pitlane.engine.text.pretokenizers import DIGIT, GPT2, PRE_TOKENIZERS
from pitlane.engine.variants import transform_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ARCHITECTURES",
    "AWQ_ORDER",
    "BLOCK_TYPES",
    "DIGIT",
    "GPT2",
    "INDEX",
    "PER_LAYER",
    "PRE_TOKENIZERS",
    "QUANTIZATION_KEYS",
    "ROPE_FREQS",
    "SINGLE",
    "WHOLE",
    "Calibrated",
    "Rounding",
    "byte_tokenizer",
    "calibrated",
    "is_query_or_key",
    "pack",
    "read_json",
    "resolve",
    "shapes_in",
    "unpack",
    "words_for",
]


class Rounding(NamedTuple):
    """How a plugin rounds the weight of a linear.

    grid: bits, group size (0: a row is a group), and 1 for a symmetric grid. codes: takes a weight [N, K]; returns its `Codes`, as
    `kernels/quantize_math.py` defines them.
    """

    grid: tuple[int, int, int]
    codes: Callable[[Tensor], Any]


class Calibrated(NamedTuple):
    """The work of plugins on the weights of a model. transform: changes the tensors of a part; recipes: by plugin.

    roundings: by the name of the linear; only plugins with a method `roundings` give them (`mixed`).
    """

    transform: Callable[[Part, Tensors], Tensors]
    recipes: Mapping[str, Recipe]
    roundings: Mapping[str, Rounding]


def calibrated(source: ModelSource, plugins: Mapping[str, Mapping[str, Any]], registry: PluginRegistry) -> Calibrated:
    """Let plugins make their recipes for a model, or find them. plugins: the settings of a plan. Raises PitlaneError.

    The weights are those of the checkpoint's dtype.
    """
    import torch

    dtype = getattr(torch, source.config.dtype)
    context = BuildContext(
        source.config, dtype, torch.device("cpu"), source.stored_name, source.weights.fingerprint, source.packings
    )
    planner = Planner(registry, context)
    plan = planner.resolve(plugins)
    context = replace(context, settings=plan.settings)
    calibrator = ModelCalibrator(source, plan, context)
    context = replace(context, calibrator=calibrator)
    for plugin in plan.plugins:
        plugin.prepare(context)
    named = {plugin.name: calibrator.recipe(plugin) for plugin in plan.plugins if hasattr(plugin.options, "text")}
    transform = transform_of(plan, context)
    recipes = {name: recipe for name, recipe in named.items() if recipe is not None}
    roundings: dict[str, Rounding] = {}
    for plugin in plan.plugins:
        if hasattr(plugin, "roundings"):
            roundings |= {name: Rounding(*values) for name, values in plugin.roundings(context).items()}
    return Calibrated(transform or (lambda part, tensors: tensors), recipes, roundings)
