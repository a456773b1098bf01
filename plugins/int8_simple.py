"""Int8 weights, the simple way: 8 bits per weight, rounded to nearest, and a scale for each output.

Changes in the loop: `build_linear` and `build_embedding` keep round(w / s), with s = max |w| / 127 of each row of a weight. A tied
head shares the table of the embedding. Weights take half the memory of bfloat16; loading makes no dense copy.
Exactness: approximate. A weight is off by at most half the scale of its row, that is 0.4 % of the row's largest weight.
Metric: share of the next token's probability that moves, mean over all tokens; value: 4 % (a perplexity of 78.6 becomes 78.2);
model: bundled in float32; text: its sample PDF (655 tokens). A test holds a bound of 5 %.
Costs: time to round at load. Helps where memory is short. On a CPU in bfloat16, ATen's int8 op reads the weights of a decode step
as they are stored. Long prompts, and other dtypes and devices, turn the weights into the model's dtype in chunks: that takes time.
Paper: LLM.int8(), https://arxiv.org/abs/2208.07339 (scales by row, without its treatment of outliers)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from pitlane import BuildContext, EmbeddingPart, LinearPart, LinearPlan, Tensors

CHUNK = 2**20  # weights converted at once, so that a chunk stays in the cache
# Most rows for ATen's op. With 128 rows, the op takes 1.0 to 1.7 times the time of chunks (AVX-512 BF16, 1 core).
OP_ROWS = 64
OP_INPUTS = 16  # ATen's op reads beyond the end of a row if the row's length is no multiple of this (torch 2.13)


class Int8Simple(Plugin):
    name, role, exactness = "int8_simple", "linear", "approximate"

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan:
        shape = part.out_features, part.in_features
        return _plan(*shape, part.bias, context, partial(Int8Linear, *shape, context))

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan:
        shape = part.num_embeddings, part.dim
        return _plan(*shape, False, context, partial(Int8Embedding, *shape, context), part.is_tied)


def _plan(
    rows: int, width: int, bias: bool, context: BuildContext, build: Callable[..., Any], has_head: bool = False
) -> LinearPlan:
    from pitlane import LinearPlan

    num_bytes = rows * (width + (1 + bias) * context.dtype.itemsize)
    return LinearPlan(num_bytes, num_bytes + 16 * max(CHUNK, width), build, has_head)


class Int8Linear:
    """A weight [N, K] as int8, and a scale [N] and bias [N] in the model's dtype."""

    def __init__(self, rows: int, width: int, context: BuildContext, tensors: list[Tensors]) -> None:
        import torch

        self.values = torch.empty(rows, width, dtype=torch.int8, device=context.device)
        self.scales = torch.empty(rows, 1, dtype=context.dtype, device=context.device)
        self.rows_per_chunk = max(1, CHUNK // width)
        weights = [chunk for member in tensors for chunk in member["weight"].split(self.rows_per_chunk)]
        sizes = [len(weight) for weight in weights]
        for weight, values, scales in zip(weights, self.values.split(sizes), self.scales.split(sizes), strict=True):
            exact = weight.float()
            scale = (exact.abs().amax(1, keepdim=True) / 127).to(context.dtype)
            scale[scale == 0] = 1
            scales.copy_(scale)
            values.copy_((exact / scale.float()).round().clamp(-127, 127))
        biases = [member["bias"].to(context.device, context.dtype) for member in tensors if "bias" in member]
        self.bias = torch.cat(biases) if biases else None
        takes_op = context.device.type == "cpu" and context.dtype == torch.bfloat16 and width % OP_INPUTS == 0
        self.op = torch._weight_int8pack_mm if takes_op else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.op is not None and 0 < len(x) <= OP_ROWS:
            y = self.op(x.contiguous(), self.values, self.scales.view(-1))
        else:
            y = x.new_empty(len(x), len(self.values))
            size = self.rows_per_chunk
            for outputs, values in zip(y.split(size, 1), self.values.split(size), strict=True):
                outputs.copy_(
                    x @ (values.to(x.dtype) / 128).T
                )  # exact; sums of whole values would leave float16's range
            y *= 128 * self.scales.view(-1)
        return y if self.bias is None else y.add_(self.bias)


class Int8Embedding:
    """Token ids [T] -> [T, dim]. linear: the head over the same table."""

    def __init__(self, rows: int, width: int, context: BuildContext, tensors: list[Tensors]) -> None:
        self.linear = Int8Linear(rows, width, context, tensors)

    def __call__(self, token_ids: Tensor) -> Tensor:
        table = self.linear
        return table.values[token_ids] * table.scales[token_ids]
