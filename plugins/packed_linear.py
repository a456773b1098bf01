"""Packed linears: bfloat16 weights in the layout of AVX-512 BF16 and AMX, read at the speed of memory.

Changes in the loop: `build_linear` packs dense weights for a kernel in C (kernels/linear.py).
Exactness: rounding. Sums are in float32, as in the core, but in another order: an output is within 2^-8 (relative) of the exact
value. The order does not depend on the batch, so a row's result has the same bits in any batch. Costs: time to pack at load; no
memory. Helps everywhere: a step of one sequence is bound by reading the weights, a step of 16 by multiplying, and the kernel does
both at once. AMX and AVX-512 share one layout; AMX sums 32 inputs at a time.
Source: GotoBLAS, Goto and van de Geijn 2008
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pitlane import BadOption, Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, Linear, LinearPart


class PackedLinear(Plugin):
    name, role, exactness = "packed_linear", "linear", "rounding"
    is_default = batch_invariant = True

    class Options(PluginOptions):
        products: Literal["auto", "amx", "vectors"] = Field(
            "auto",
            title="Instructions",
            description="amx multiplies with AMX tiles, vectors with AVX-512; auto uses AMX if the CPU has it",
        )

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import linear
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or linear.unavailable()

    @hookimpl
    def build_linear(self, parts: list[LinearPart], context: BuildContext) -> Linear | None:
        import torch

        from pitlane.kernels.linear import Packed, has_amx

        amx = self.options.products != "vectors" and has_amx()
        if self.options.products == "amx" and not amx:
            raise BadOption(
                "packed_linear.products = amx: this CPU has no AMX, or the operating system does not allow it; use auto"
            )
        if any("weight" not in part.tensors or part.in_features % 2 for part in parts):
            return None
        weight = torch.cat([part.tensors["weight"].to(context.dtype) for part in parts])
        bias = None
        if any("bias" in part.tensors for part in parts):
            biases = [part.tensors.get("bias", torch.zeros(part.out_features)) for part in parts]
            bias = torch.cat([part_bias.to(context.dtype) for part_bias in biases])
        return Packed(weight, bias, amx)
