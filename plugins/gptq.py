"""GPTQ: round weights column by column; the columns not rounded yet make up for the error.

Changes in the loop: `build_linear` packs the codes of a recipe. The recipe chooses codes by the second moments H = X^T X of a
linear's inputs over the calibration text. The inputs of a layer come from the layers before it with their rounded weights. Codes of
2 to 4 bits run on the kernel of int4 and take its bytes, so 2 and 3 bits show their quality and save nothing. Codes of 5 to 8 bits
run as a dense weight, for quality only. `build_embedding` keeps head and embedding in 8 bits, rounded to nearest.
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

from pitlane import BadOption, LayerRecipe, LinearPart, LinearPlan, Plugin, PluginOptions, calibration_hash, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import BuildContext, EmbeddingPart, LayerInputs, Recipe
    from pitlane.kernels.integer_parts import Recipe as Ends
    from pitlane.kernels.packing import Format
    from pitlane.kernels.quantize_math import Codes


class Gptq(Plugin):
    name, role, exactness = "gptq", "linear", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        bits: int = Field(
            4,
            ge=2,
            le=8,
            title="Bits",
            description="2 to 4 run on the kernel of int4; 5 to 8 run dense, for quality only",
        )
        group_size: Literal[32, 64, 128] = Field(
            64, title="Group size", description="inputs that share a scale; must divide the inputs of every linear"
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

    @classmethod
    def key_of(cls, options: Any) -> str:
        return super().key_of(options) + calibration_hash(options.text)

    def refusal(self, context: BuildContext) -> str | None:
        from pitlane import parts_of
        from pitlane.kernels.packing import group_refusal

        parts = [part for part in parts_of(context.config) if isinstance(part, LinearPart)]
        inputs = {part.name: part.in_features for part in parts if part.fed_by is not None}
        otherwise = "no group size fits this model; use int8"
        return group_refusal("gptq.group_size", self.options.group_size, inputs, otherwise)

    def prepare(self, context: BuildContext) -> None:
        if context.calibrator is None:
            raise BadOption("gptq needs the weights of a model to make its recipe")
        context.calibrator.build(self, self._visit, hessians=True)

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane.kernels.integer_parts import codes_plan, rounded_plan

        sizes = part.out_features, part.in_features, part.bias
        if part.fed_by is None:
            plan = self._ends.linear(part, context) if part.name == "lm_head" else None
            return plan and LinearPlan(**plan._asdict())
        recipe = context.calibrator.recipe(self) if context.calibrator else None
        codes = partial(_codes, recipe, [member.name for member in part.members])
        if self.options.bits <= 4:
            return LinearPlan(**codes_plan(*sizes, self._form, context.dtype, context.device, codes)._asdict())
        return LinearPlan(**rounded_plan(part.num_values, context.dtype, context.device, codes)._asdict())

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
        plan = self._ends.embedding(part, context)
        return plan and LinearPlan(**plan._asdict())

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
    def _form(self) -> Format:
        from pitlane.kernels.packing import Format

        options = self.options
        return Format(4, options.activations == "int8", options.group_size, options.symmetric)

    @property
    def _ends(self) -> Ends:
        """How embedding and head are stored."""
        from pitlane.kernels.integer_parts import Recipe

        return Recipe.of_ends(self.options.head == "int8", self.options.activations == "int8")


def _codes(recipe: Recipe | None, names: list[str], members: Any) -> Codes:
    """The codes of a part, by the names of its members."""
    from pitlane.kernels.quantize_math import Codes, joined

    if recipe is None:
        raise BadOption("gptq has no recipe for this model yet; load the model with an engine")
    pieces = []
    for name in names:
        codes, scales = recipe.get(f"{name}.codes"), recipe.get(f"{name}.scales")
        if codes is None or scales is None:
            raise BadOption(
                f"the recipe {recipe.folder} lacks {name}; delete this folder: the next load builds it again"
            )
        pieces.append(Codes(codes, scales, recipe.get(f"{name}.zeros")))
    return joined(pieces)
