"""GPTQ: round weights column by column; the columns not rounded yet make up for the error.

Changes in the loop: `build_linear` packs the codes of a recipe. The recipe chooses codes by the second moments H = X^T X of a
linear's inputs over the calibration text. The inputs of a layer come from the layers before it with their rounded weights. Codes of
2 to 4 bits in groups run on the kernel of int4 and take its bytes, so 2 and 3 bits show their quality and save nothing. Symmetric
codes of 8 bits with `group_size` 0 run on the kernel of int8. All other codes run as a dense weight, for quality only.
`build_embedding` keeps head and embedding in 8 bits, rounded to nearest.
With `act_order`, GPTQ rounds the columns of large inputs first. Groups keep the order of the inputs, so the kernel needs no
permutation. The first use makes a recipe of a byte per weight, kept under PITLANE_HOME.
Exactness: approximate.
Metric: share of the next token's probability that moves, mean over all tokens; value: 13.7 % with symmetric groups of 64 (int4
28.3 %; a perplexity of 82.3 becomes 82.9, with int4 105.2); model: bundled in bfloat16; text: its sample PDF (655 tokens). A test
holds a bound of 17 %. docs/quantization.md has more.
Costs: time at the first use, more than awq; memory at the first use: a layer in float32 and its Hessians.
Helps where int4 loses too much: larger groups, symmetric grids, 3 bits.
Paper: GPTQ, https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pitlane import BadOption, CalibratedPlugin, LayerRecipe, LinearPart, LinearPlan, PluginOptions, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import BuildContext, EmbeddingPart, LayerInputs
    from pitlane.kernels.packing import Format
    from pitlane.kernels.quantize_math import Codes


class Gptq(CalibratedPlugin):
    name, role, exactness = "gptq", "linear", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        bits: int = Field(
            4,
            ge=2,
            le=8,
            title="Bits",
            description="2 to 4 run on the kernel of int4, 8 with group_size 0 on that of int8; others dense, for quality",
        )
        group_size: Literal[0, 32, 64, 128] = Field(
            64,
            title="Group size",
            description="inputs that share a scale; must divide the inputs of every linear; 0: all inputs of an output",
        )
        symmetric: bool = Field(True, title="Symmetric", description="zero is the middle of a group's range")
        act_order: bool = Field(True, title="Act-order", description="round columns of large inputs first")
        damping: float = Field(
            0.01, gt=0, le=1, title="Damping", description="share of the Hessian's mean diagonal added to its diagonal"
        )
        clip: bool = Field(True, title="Clip", description="search the range of every group, weighted by the inputs")
        activations: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Activations",
            description="int8 rounds the inputs of a linear to 8 bits; bfloat16 keeps the dtype",
        )
        head: Literal["int8", "bfloat16"] = Field(
            "int8", title="Head", description="the head and the embedding have 8 bits; bfloat16 keeps them"
        )
        text: str = Field("", title="Text", description="file of calibration text; empty: the text that Pitlane brings")
        tokens: int = Field(8192, ge=64, le=262144, title="Tokens", description="calibration tokens, at most")

    def refusal(self, context: BuildContext) -> str | None:
        from pitlane import parts_of
        from pitlane.kernels.packing import group_refusal

        parts = [part for part in parts_of(context.config) if isinstance(part, LinearPart)]
        inputs = {part.name: part.in_features for part in parts if part.fed_by is not None}
        size, otherwise = self.options.group_size, "no group size fits this model; use int8"
        return group_refusal("gptq.group_size", size, inputs, otherwise) if size else None

    def prepare(self, context: BuildContext) -> None:
        self.build_recipe(context, self._visit, hessians=True)

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane.kernels.integer_parts import Recipe, codes_plan, rounded_plan

        sizes = part.out_features, part.in_features, part.bias
        if part.fed_by is None:
            is_head = part.name == "lm_head"
            return LinearPlan.of(Recipe.of_ends(self.options).linear(part, context)) if is_head else None
        codes = partial(self._codes, context, [member.name for member in part.members])
        if self._form is not None:
            return LinearPlan.of(codes_plan(*sizes, self._form, context.dtype, context.device, codes))
        return LinearPlan.of(rounded_plan(part.num_values, context.dtype, context.device, codes))

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
        from pitlane.kernels.integer_parts import Recipe

        return LinearPlan.of(Recipe.of_ends(self.options).embedding(part, context))

    def _visit(self, layer: LayerInputs) -> LayerRecipe:
        import torch

        from pitlane.kernels.quantize_math import InputStats, output_error, quantize_linear

        options = self.options
        tensors, notes, weights = dict[str, "Tensor"](), {}, {}
        for part in layer.linears:
            names, stats = [member.name for member in part.members], InputStats(*layer.stats[part.members[0].name])
            weight = torch.cat([layer.weight(name) for name in names])
            grid = (options.bits, options.group_size, options.symmetric)
            nearest = quantize_linear(weight, *grid).dequantized()
            codes = quantize_linear(
                weight,
                *grid,
                "gptq",
                stats,
                act_order=options.act_order,
                damping=options.damping,
                clip=options.clip,
            )
            assert stats.hessian is not None
            rounded = codes.dequantized()
            notes[part.name] = {
                "nearest": float(output_error(nearest - weight, stats.hessian).sum()),
                "error": float(output_error(rounded - weight, stats.hessian).sum()),
            }
            row = 0
            for name, size in part.members:
                piece = codes.rows(row, row + size)
                tensors |= {f"{name}.codes": piece.codes, f"{name}.scales": piece.scales}
                if piece.zeros is not None:
                    tensors[f"{name}.zeros"] = piece.zeros
                weights[name] = rounded[row : row + size]
                row += size
        return LayerRecipe(tensors, notes, weights)

    @property
    def _form(self) -> Format | None:
        """The format of the kernel that runs the codes; None: no kernel does."""
        from pitlane.kernels.packing import Format

        options, quantized = self.options, self.options.activations == "int8"
        if options.group_size and options.bits <= 4:
            return Format(4, quantized, options.group_size, options.symmetric)
        is_int8 = options.bits == 8 and not options.group_size and options.symmetric
        return Format(8, quantized) if is_int8 else None

    def _codes(self, context: BuildContext, names: list[str], members: Any) -> Codes:
        """The codes of a part, by the names of its members."""
        from pitlane.kernels.quantize_math import Codes, joined

        recipe, pieces = self.recipe(context), []
        for name in names:
            codes, scales = recipe.get(f"{name}.codes"), recipe.get(f"{name}.scales")
            if codes is None or scales is None:
                raise BadOption(
                    f"the recipe {recipe.folder} lacks {name}; delete this folder: the next load builds it again"
                )
            pieces.append(Codes(codes, scales, recipe.get(f"{name}.zeros")))
        return joined(pieces)
