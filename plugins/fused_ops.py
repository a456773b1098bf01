"""Fused operations: a norm or an activation in one pass over its rows, instead of eight and three.

Changes in the loop: `build_op` gives the model rms_norm and silu_mul in C (kernels/ops.py).
Exactness: rounding. Float32 inside and rounded once: outputs are within a bfloat16 rounding (2^-8 relative) of exact, and no row
depends on others. Costs: nothing. Helps small models and batches, where a step is not all products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext


class FusedOps(Plugin):
    name, exactness = "fused_ops", "rounding"
    is_default = batch_invariant = True

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import ops
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or ops.unavailable()

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Callable[..., Any] | None:
        from pitlane.kernels import ops

        found: dict[str, Callable[..., Any]] = {"rms_norm": ops.rms_norm, "silu_mul": ops.silu_mul}
        return found.get(kind)
