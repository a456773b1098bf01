"""Few bits: every weight rounded to nearest on a grid of 2 to 8 bits. For measurements of quality: weights keep their bytes.

Changes in the loop: `transform_weights` rounds the weights of the linears to a grid of `bits`; `group_size` inputs share a scale.
Head and embedding stay. Then the core, or a plugin of the role linear, builds the rounded weights. Use few_bits to measure quality
against bits, and int8 or int4 to save bytes.
Exactness: approximate. A weight is off by at most half a step of its group; with `symmetric`, by a step at the end of the range.
Metric: share of the next token's probability that moves, mean over all tokens; value: 28.3 % with 4 bits, 44.0 % with 3 bits, in
symmetric groups of 64; model: bundled in bfloat16; text: its sample PDF (655 tokens). A test holds bounds of 32 and 50 %.
Costs: time to round at load. It saves no memory and no time.
Paper: Dettmers and Zettlemoyer 2022, the case for 4-bit precision, https://arxiv.org/abs/2212.09720
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pitlane import LinearPart, Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, Part, Tensors


class FewBits(Plugin):
    name, exactness, stage = "few_bits", "approximate", 30
    conflicts = ("int4", "gptq", "mixed")

    class Options(PluginOptions):
        bits: int = Field(
            4, ge=2, le=8, title="Bits", description="bits of a weight; the scale of its group takes more"
        )
        group_size: Literal[0, 32, 64, 128] = Field(
            64, title="Group size", description="inputs that share a scale; 0: all inputs of an output share a scale"
        )
        symmetric: bool = Field(True, title="Symmetric", description="zero is the middle of a group's range")

    def refusal(self, context: BuildContext) -> str | None:
        from pitlane import parts_of
        from pitlane.kernels.packing import group_refusal

        parts = [part for part in parts_of(context.config) if isinstance(part, LinearPart)]
        inputs = {part.name: part.in_features for part in parts if part.fed_by is not None}
        size, otherwise = self.options.group_size, "0 makes a row a group"
        return group_refusal("few_bits.group_size", size, inputs, otherwise) if size else None

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors) -> Tensors | None:
        from pitlane.kernels.quantize_math import quantize_linear

        if not isinstance(part, LinearPart) or part.fed_by is None:
            return None
        options, weight = self.options, tensors["weight"]
        rounded = quantize_linear(weight, options.bits, options.group_size, options.symmetric).dequantized()
        return {**tensors, "weight": rounded.to(weight.dtype)}
