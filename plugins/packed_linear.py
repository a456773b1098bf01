"""Packed linears: bfloat16 weights laid out for AVX-512 BF16, read at the speed of memory.

Changes in the loop: `build_linear` packs dense weights for a kernel in C (kernels/linear.py) that keeps every row's order of sums.
Exactness: rounding. Sums are in float32 as without it, in another order: outputs are within a bfloat16 rounding (2^-8 relative)
of their exact value, and a row's result is equal to the bit in any batch. Costs: packing at load, no memory. Helps everywhere: a
step of one sequence is bound by reading the weights, one of 16 by operations, and this does both at once.
Source: GotoBLAS, Goto and van de Geijn 2008
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, Linear, LinearPart


class PackedLinear(Plugin):
    name, role, exactness = "packed_linear", "linear", "rounding"

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import linear
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or linear.unavailable()

    @hookimpl
    def build_linear(self, parts: list[LinearPart], context: BuildContext) -> Linear | None:
        import torch

        from pitlane.kernels.linear import Packed

        if any("weight" not in part.tensors or part.in_features % 2 for part in parts):
            return None
        weight = torch.cat([part.tensors["weight"].to(context.dtype) for part in parts])
        bias = None
        if any("bias" in part.tensors for part in parts):
            each = [part.tensors.get("bias", torch.zeros(part.out_features)) for part in parts]
            bias = torch.cat([one.to(context.dtype) for one in each])
        return Packed(weight, bias)
