"""AWQ: scale the weights that large inputs meet before int4 rounds them, and clip the range of every group.

Changes in the loop: `transform_weights` multiplies the columns of a linear by factors, divides the norm or the linear before it by
the same factors, and clips weights. The plugin `int4` then rounds the weights. The factors are rms(input)^a per channel. A search
chooses a in [0, 1] for every linear, and the range of every group and output between 50 % and 100 %. It measures the squared error
of a linear's outputs over the calibration text. On this text, the error is never above the error of round to nearest.
The first use makes a recipe (some minutes for a small model) and keeps it under PITLANE_HOME. The recipe depends on the model, the
options of this plugin and of `int4`, and the plugins that change weights before.
Exactness: approximate. Before `int4` rounds, the model's function is the same: the norm or linear before undoes every factor.
Metric: share of the next token's probability that moves, mean over all tokens; value: 19.9 % with int4 in symmetric groups of 64
(28.3 % without awq; a perplexity of 82.3 becomes 89.3, without awq 105.2); model: bundled in bfloat16; text: its sample PDF (655
tokens). A test holds a bound of 23 %. docs/quantization.md has more.
Costs: time at the first use and at load; a step takes no longer.
Paper: AWQ, https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from pitlane import BadOption, CalibratedPlugin, LayerRecipe, LinearPart, NormPart, PluginOptions, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pitlane import BuildContext, LayerInputs, Part, Tensors
    from pitlane.kernels.packing import Format


class Awq(CalibratedPlugin):
    name, exactness, stage = "awq", "approximate", 10
    requires, conflicts = ("int4",), ("smoothquant",)

    class Options(PluginOptions):
        bits: int = Field(
            4,
            ge=2,
            le=4,
            title="Bits",
            description="below 4, weights have a coarser grid but take the bytes of int4: for quality only; needs int4.symmetric",
        )
        clip: bool = Field(True, title="Clip", description="search the range of every group")
        text: str = Field("", title="Text", description="file of calibration text; empty: the text that Pitlane brings")
        tokens: int = Field(8192, ge=64, le=262144, title="Tokens", description="calibration tokens, at most")

    def prepare(self, context: BuildContext) -> None:
        self.build_recipe(context, partial(self._visit, context, self._format(context)), hessians=True)

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors, context: BuildContext) -> Tensors | None:
        from pitlane.kernels.scaling import scaled

        if not isinstance(part, (LinearPart, NormPart)):
            return None
        changed = scaled(
            part.name, tensors, self.recipe(context).get, part.offset if isinstance(part, NormPart) else 0.0
        )
        if self.options.bits < 4 and isinstance(part, LinearPart) and part.tied_to is None and part.name != "lm_head":
            tensors = changed or tensors
            changed = {**tensors, "weight": self._rounding(self._format(context))(tensors["weight"].float())}
        return changed

    def _visit(self, context: BuildContext, form: Format, layer: LayerInputs) -> LayerRecipe:
        import torch

        from pitlane.kernels.quantize_math import InputStats
        from pitlane.kernels.scale_search import awq_scales, clip_shares
        from pitlane.kernels.scaling import recipe_tensors, shared

        rounded, tensors, notes = self._rounding(form), dict[str, "Tensor"](), {}
        for part in layer.linears:
            names, stats = [member.name for member in part.members], InputStats(*layer.stats[part.members[0].name])
            weight = torch.cat([layer.weight(name) for name in names])
            feed, factors = part.fed_by, torch.ones(part.in_features)
            note = {}
            if feed is not None:
                search = awq_scales(weight, stats, rounded, partial(shared, groups=feed.groups, repeats=feed.repeats))
                note = {"power": search.power, "start": search.start, "error": search.error}
                moved, factors = recipe_tensors(feed, names, search.scales, layer.weight, context.dtype)
                tensors |= moved
            if self.options.clip and stats.hessian is not None:
                hessian = stats.hessian / factors[:, None] / factors
                shares, before, after = clip_shares(weight * factors, hessian, form.group_size, rounded)
                note |= {"before_clip": float(before.sum()), "after_clip": float(after.sum())}
                sizes = [member.out_features for member in part.members]
                tensors |= {
                    f"{name}.clip": piece.half() for name, piece in zip(names, shares.split(sizes), strict=True)
                }
            notes[part.name] = note
        return LayerRecipe(tensors, notes)

    def depends(self, context: BuildContext) -> str:
        return f"{self.key} {self._format(context)} {context.dtype}"

    def _format(self, context: BuildContext) -> Format:
        from pitlane.kernels.packing import Format

        options = context.settings["int4"]
        if self.options.bits < 4 and not options["symmetric"]:
            raise BadOption(
                f"awq.bits = {self.options.bits} needs int4.symmetric = true: only this grid includes the grid of fewer bits"
            )
        return Format(4, False, options["group_size"], options["symmetric"])

    def _rounding(self, form: Format) -> Callable[[Tensor], Tensor]:
        """The function that rounds a weight [N, K] as int4 will."""
        from pitlane.kernels.packing import UNIT, quantize_groups
        from pitlane.kernels.quantize_math import quantize_linear

        def rounded(weight: Tensor) -> Tensor:
            if form.symmetric:
                return quantize_linear(weight, self.options.bits, form.group_size).dequantized()
            numbers, scales, lows = quantize_groups(weight, form)
            assert lows is not None
            return ((numbers * scales.float()[..., None] + lows.float()[..., None]) * UNIT).flatten(1)

        return rounded
