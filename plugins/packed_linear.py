"""Packed linears: bfloat16 weights in the layout of AVX2, AVX-512 and AMX, read at the speed of memory.

Changes in the loop: `build_linear` packs dense weights for a kernel in C (kernels/linear.py).
Exactness: rounding. Sums are in float32, as in the core, but in another order: an output is within 2^-8 (relative) of the exact
value. The order does not depend on the batch, so a row's result has the same bits in any batch. Costs: time to pack at load; no
memory. Helps everywhere: a step of one sequence is bound by reading the weights, a step of 16 by multiplying, and the kernel does
both at once. All products share one layout. AMX sums 32 inputs at a time. AVX-512 BF16 multiplies pairs of bfloat16. AVX-512 and
AVX2 widen them to float32. Where the instruction for pairs is slow (an Intel Xeon without AMX), float32 is 1.7 times as fast from
16 rows on. `auto` measures both once per process, in about 5 ms. Saved KV is kept apart for each kind of products.
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
        products: Literal["auto", "amx", "vectors", "float32"] = Field(
            "auto",
            title="Instructions",
            description="amx multiplies with AMX tiles, vectors with AVX-512 BF16, float32 with AVX-512 or AVX2 on wide numbers; "
            "auto uses AMX if the CPU has it, else the faster of the other two",
        )

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import linear
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or linear.unavailable()

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        """Add the products that `auto` means on this CPU: another CPU, or another version, may choose others."""
        from pitlane.kernels.linear import fastest_products

        key = super().key_of(options)
        assert isinstance(options, PackedLinear.Options), "the options of another plugin"
        return f"{key} {fastest_products()}" if options.products == "auto" else key

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        from pitlane import LinearPlan
        from pitlane.kernels.integer_parts import bfloat16_plan
        from pitlane.kernels.linear import fastest_products, has_amx, has_vectors

        products = self.options.products
        if products == "amx" and not has_amx():
            raise BadOption(
                "packed_linear.products = amx: this CPU has no AMX, or the operating system does not allow it; use auto"
            )
        if products == "vectors" and not has_vectors():
            raise BadOption(
                "packed_linear.products = vectors: this CPU has no AVX-512 BF16, or PITLANE_CPU_KERNELS forbids it; use auto"
            )
        if part.in_features % 2:
            return None
        sizes = part.out_features, part.in_features, part.bias, len(part.members)
        products = fastest_products() if products == "auto" else products
        return LinearPlan.of(bfloat16_plan(*sizes, context.stored_dtype, products))
