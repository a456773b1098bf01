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
    from pitlane import BuildContext, LinearPart, LinearPlan


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
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane import LinearPlan
        from pitlane.kernels.integer_parts import bfloat16_plan
        from pitlane.kernels.linear import has_amx

        amx = self.options.products != "vectors" and has_amx()
        if self.options.products == "amx" and not amx:
            raise BadOption(
                "packed_linear.products = amx: this CPU has no AMX, or the operating system does not allow it; use auto"
            )
        if part.in_features % 2:
            return None
        sizes = part.out_features, part.in_features, part.bias, len(part.members)
        return LinearPlan(**bfloat16_plan(*sizes, context.stored_dtype, amx)._asdict())
