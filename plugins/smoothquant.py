"""SmoothQuant: move the outliers of a linear's inputs into its weights, so that both round well to 8 bits.

Changes in the loop: `transform_weights` multiplies the columns of a linear by factors, and divides the norm or the linear before it
by the same factors. The plugin `int8` then rounds weights and inputs. The factors are absmax(input)^a / absmax(weight)^(1 - a) per
channel. A search chooses a in [0, 1] for every linear, by the squared error of the outputs with both roundings. If smoothing does
not help a linear, the linear stays as it is. The first use makes a recipe, kept under PITLANE_HOME.
Exactness: approximate. Before `int8` rounds, the model's function is the same: the norm or linear before undoes every factor.
Metric: share of the next token's probability that moves, mean over all tokens; value: 4.3 % (int8 alone 4.6 %); model: bundled in
bfloat16; text: its sample PDF (655 tokens). On the same model with artificial outlier channels, the KL divergence is 0.005
nats a token, with int8 alone 1.6; tests hold bounds of 6 % and of a tenth. int8 rounds inputs in groups of 64 channels, so
outliers hurt less than with a scale per token; a model without outliers gains nothing.
Costs: time at the first use and at load; a step takes no longer.
Paper: SmoothQuant, https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pitlane import BadOption, CalibratedPlugin, LayerRecipe, LinearPart, NormPart, PluginOptions, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import BuildContext, LayerInputs, Part, Tensors


class Smoothquant(CalibratedPlugin):
    name, exactness, stage = "smoothquant", "approximate", 10
    requires, conflicts = ("int8",), ("awq",)

    class Options(PluginOptions):
        text: str = Field("", title="Text", description="file of calibration text; empty: the text that Pitlane brings")
        tokens: int = Field(8192, ge=64, le=262144, title="Tokens", description="calibration tokens, at most")

    def prepare(self, context: BuildContext) -> None:
        if context.settings["int8"]["activations"] != "int8":
            raise BadOption("smoothquant smooths inputs of 8 bits; set int8.activations to int8, or remove smoothquant")
        self.build_recipe(context, partial(_visit, context))

    def depends(self, context: BuildContext) -> str:
        return f"{self.key} {context.dtype}"

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors, context: BuildContext) -> Tensors | None:
        from pitlane.kernels.scaling import scaled

        if not isinstance(part, (LinearPart, NormPart)):
            return None
        recipe = self.recipe(context)
        return scaled(part.name, tensors, recipe.get, part.offset if isinstance(part, NormPart) else 0.0)


def _visit(context: BuildContext, layer: LayerInputs) -> LayerRecipe:
    import torch

    from pitlane.kernels.packing import INPUT_GROUP, quantize_inputs, quantize_rows
    from pitlane.kernels.quantize_math import InputStats
    from pitlane.kernels.scale_search import smooth_scales
    from pitlane.kernels.scaling import recipe_tensors, shared

    def rounded(weight: Tensor) -> Tensor:
        numbers, scales = quantize_rows(weight)
        return numbers * scales[:, None]

    def rounded_inputs(x: Tensor) -> Tensor:
        numbers, scales = quantize_inputs(x, INPUT_GROUP)
        return (numbers * scales[..., None]).flatten(1)[:, : x.shape[1]]

    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    for part in layer.linears:
        feed, names = part.fed_by, [member.name for member in part.members]
        if feed is None:
            continue
        stats = InputStats(*layer.stats[names[0]])
        weight = torch.cat([layer.weight(name) for name in names])
        same = partial(shared, groups=feed.groups, repeats=feed.repeats)
        search = smooth_scales(weight, stats, rounded, rounded_inputs, same)
        outliers = float(stats.absmax.amax() / stats.absmax.median().clamp(min=1e-9))
        notes[part.name] = {"power": search.power, "start": search.start, "error": search.error, "outliers": outliers}
        tensors |= recipe_tensors(feed, names, search.scales, layer.weight, context.dtype)[0]
    return LayerRecipe(tensors, notes)
