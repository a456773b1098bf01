"""Int8: weights of 8 bits, rounded to nearest, with a scale for each output; half the memory of bfloat16.

Changes in the loop: `build_linear` and `build_embedding` keep round(w / s), with s = max |w| / 127 of each row of a weight. A
tied head shares the table of the embedding. With `activations` = int8, the inputs of a linear are rounded too, with a scale per
token and 64 inputs. Loading reads each weight once and makes no dense copy. A kernel in C serves bfloat16 and float32 on a CPU
(VNNI, AVX2, plain C): a row's result has the same bits in any batch. Elsewhere torch computes the same sums, and a warning says
why.
Exactness: approximate. A weight is off by at most half the scale of its row, that is 0.4 % of the row's largest weight.
Metric: share of the next token's probability that moves, mean over all tokens; value: 4.4 % (a perplexity of 78.58 becomes 78.64;
4.1 % and 78.33 with `activations` = bfloat16; the default plan in bfloat16 moves 1.2 %); model: bundled in bfloat16, against itself
in float32; text: its sample PDF (655 tokens). A test holds a bound of 6 %. SmolLM2 in float32, 8,176 tokens of
four texts: the perplexity rises by 1.0 % (standard error 0.2 %), and by 0.6 % (0.1 %) with `activations` = bfloat16.
docs/quantization.md shows by which rounding. `gptq` with 8 bits loses less.
Costs: time to round at the first load; a packed copy of large parts is kept for later loads in `cache/packed` of the data folder.
Helps where a step is bound by reading weights: a decode step reads half the bytes.
Paper: LLM.int8(), https://arxiv.org/abs/2208.07339 (scales by row and token, without its treatment of outliers)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pitlane import Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, EmbeddingPart, LinearPart, LinearPlan
    from pitlane.kernels.integer_parts import Recipe


class Int8(Plugin):
    name, role, exactness = "int8", "linear", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        activations: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Activations",
            description="int8 rounds the inputs of a linear to 8 bits; bfloat16 keeps them in the model's dtype",
        )
        head: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Head",
            description="the head and the embedding; bfloat16 keeps them in the model's dtype",
        )

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane import LinearPlan

        return LinearPlan.of(self._recipe(context).linear(part, context))

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
        from pitlane import LinearPlan

        return LinearPlan.of(self._recipe(context).embedding(part, context))

    def _recipe(self, context: BuildContext) -> Recipe:
        from pitlane.kernels.integer_parts import Recipe
        from pitlane.kernels.packing import Format
        from pitlane.storage.packed import copies_by_recipe

        options, quantized = self.options, self.options.activations == "int8"
        head = Format(8, quantized) if options.head == "int8" else None
        return Recipe(Format(8, quantized), head, copies_by_recipe(context.fingerprint))
