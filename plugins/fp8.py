"""Fp8: weights in float8 (e4m3), rounded to nearest; half the memory of bfloat16, with an exponent for every weight.

Changes in the loop: `build_linear` keeps W / scale in e4m3: 4 significant bits, with steps down to 2^-9. `granularity` says which
weights share a scale: all weights of a linear (`tensor`), the weights of an output (`channel`), or a block of 128 x 128 (`block`).
The largest weight of a scale becomes 448.
On a CPU, fp8 is a storage format: a kernel in C widens the bytes to bfloat16 in registers (AVX2, AVX-512) or to float32 (plain C).
On CUDA, a kernel in Triton widens the bytes to the model's dtype; no GPU has run it yet. The inputs stay as they are, on every
device. The embedding stays in the model's dtype.
Exactness: approximate. W / scale is off by at most 1/16 of itself, and below 2^-6 by at most 2^-10.
Metric: share of the next token's probability that moves, mean over all tokens; value: 5.4 % (a perplexity of 78.58 becomes 80.19;
7.1 % and 78.39 with one scale per weight, 6.6 % and 78.61 in blocks; the default plan in bfloat16 moves 1.2 %); model: bundled in
bfloat16, against itself in float32; text: its sample PDF (655 tokens). A test holds bounds of 12 % and 4 % of perplexity.
Costs: time to round at load; a byte per weight, as with `int8`. The error of `int8` is smaller if the weights of an output have
similar sizes. Helps if the sizes of weights differ by orders of magnitude, and runs FP8 checkpoints without conversion.
Paper: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pitlane import Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    import torch

    from pitlane import BuildContext, LinearPart, LinearPlan, Tensors
    from pitlane.kernels.fp8 import Fp8Linear


class Fp8(Plugin):
    name, role, exactness = "fp8", "linear", "approximate"
    batch_invariant = True

    class Options(PluginOptions):
        granularity: Literal["tensor", "channel", "block"] = Field(
            "channel",
            title="Granularity",
            description="weights that share a scale: a whole linear, an output, or a block of 128 x 128",
        )
        head: Literal["fp8", "bfloat16"] = Field(
            "fp8", title="Head", description="the head; bfloat16 keeps it in the model's dtype"
        )

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        from pitlane.kernels.extension import key_by_level

        return key_by_level(super().key_of(options))

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane import LinearPlan
        from pitlane.kernels.fp8 import BLOCK, CHUNK, chosen_level, num_bytes

        if part.name == "lm_head" and self.options.head != "fp8":
            return None
        inputs, granularity = part.in_features, self.options.granularity
        group = BLOCK if granularity == "block" else inputs
        level = chosen_level(inputs, group, context.dtype, context.device)
        size = num_bytes(part.out_features, inputs, group, context.device) + 4 * part.bias * part.out_features
        build = partial(_build, part, granularity, level, context.device)
        rounding = 16 * max(CHUNK, inputs) + 2 * part.num_values  # a chunk in float32, and the bytes before packing
        return LinearPlan(size, size + rounding, build, batch_invariant=level is not None)


def _build(
    part: LinearPart, granularity: str, level: int | None, device: torch.device, tensors: list[Tensors]
) -> Fp8Linear:
    import torch

    from pitlane.kernels.fp8 import Fp8Linear, quantize

    bias = torch.cat([member["bias"].float() for member in tensors]) if part.bias else None
    return Fp8Linear([quantize(member["weight"], granularity) for member in tensors], bias, level, device)
