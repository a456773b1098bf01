"""Int4: weights of 4 bits in groups, rounded to nearest; a third of the memory of bfloat16. The head has 8 bits.

Changes in the loop: `build_linear` cuts the inputs of a linear into groups of `group_size`. A weight of a group is scale * n +
low, with n in [0, 15]; `symmetric` fixes the low at -8 scales. `build_embedding` keeps the table in 8 bits, and a tied head
shares it. With `activations` = int8, the inputs of a linear are rounded to 8 bits, with a scale per token and group. Loading
reads each weight once and makes no dense copy. A kernel in C serves bfloat16 and float32 on a CPU (VNNI, AVX2, plain C): a row's
result has the same bits in any batch. Elsewhere torch computes the same sums, and a warning says why.
Exactness: approximate. A weight is off by at most half the scale of its group, that is 1/30 of the group's range; with `symmetric`
by at most 1/8 of the group's largest weight. Scales and lows are float16.
Metric: share of the next token's probability that moves, mean over all tokens; value: 16.5 % (a perplexity of 78.6 becomes 84.2;
21.7 % and 87.8 with groups of 64; 25.6 % and 103.4 with `symmetric`; the default plan in bfloat16 moves 1.2 %); model: bundled in
bfloat16, against itself in float32; text: its sample PDF (655 tokens). Tests hold bounds of 20, 26 and 30 %.
Costs: time to round at the first load; a packed copy of large parts is kept for later loads in `cache/packed` of the data folder.
Answers of small models get worse. Helps where a step is bound by reading weights: a decode step reads 5 bits per weight (4.5 with
`symmetric`, less with larger groups), where bfloat16 has 16.
Paper: GPTQ, https://arxiv.org/abs/2210.17323 (its baseline: round to nearest in groups)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pitlane import Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, EmbeddingPart, LinearPart, LinearPlan
    from pitlane.kernels.integer_parts import Recipe


class Int4(Plugin):
    name, role, exactness = "int4", "linear", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        group_size: Literal[32, 64, 128] = Field(
            32, title="Group size", description="inputs that share a scale; must divide the inputs of every linear"
        )
        symmetric: bool = Field(
            False,
            title="Symmetric",
            description="zero is the middle of a group's range: 0.5 bits less at group_size 32",
        )
        activations: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Activations",
            description="int8 rounds the inputs of a linear to 8 bits; bfloat16 keeps them in the model's dtype",
        )
        head: Literal["int8", "bfloat16"] = Field(
            "int8",
            title="Head",
            description="the head and the embedding have 8 bits; bfloat16 keeps them in the model's dtype",
        )

    def refusal(self, context: BuildContext) -> str | None:
        from pitlane import LinearPart, parts_of
        from pitlane.kernels.packing import group_refusal

        parts = [part for part in parts_of(context.config) if isinstance(part, LinearPart)]
        inputs = {part.name: part.in_features for part in parts if part.name != "lm_head" and not part.num_experts}
        otherwise = "no group size fits this model; use int8"
        return group_refusal("int4.group_size", self.options.group_size, inputs, otherwise)

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
        return Recipe(
            Format(4, quantized, options.group_size, options.symmetric), head, copies_by_recipe(context.fingerprint)
        )
