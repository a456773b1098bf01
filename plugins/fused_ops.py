"""Fused operations: RMS norm and SiLU in one pass over memory each, instead of eight and three.

Changes in the loop: `build_op` gives the model `rms_norm` and `silu_mul` in C (kernels/ops.py). On CUDA it gives these, `gelu_mul`,
`add_rms_norm` (the sum of the residual stream and its norm), `rope_store` (RoPE and the KV write) and `sample` (the tokens of a
step) in Triton (kernels/cuda); no GPU has run them yet.
Exactness: rounding. The kernels compute in float32 and round once: an output is within 2^-8 (relative) of the exact value. The sum
of the residual stream stays in float32. A row's result does not depend on the other rows. Costs: nothing. Helps small models and
batches, where a step is more than matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, PluginOptions


class FusedOps(Plugin):
    name, exactness = "fused_ops", "rounding"
    is_default = batch_invariant = True

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import ops
        from pitlane.kernels.cuda import device
        from pitlane.kernels.extension import unsupported

        if device.serves(context.device):
            return device.unsupported(context.dtype, context.device)
        return unsupported(context.dtype, context.device) or ops.unavailable()

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        from pitlane.kernels.extension import key_by_level

        return key_by_level(super().key_of(options))

    @hookimpl
    def build_op(self, kind: str, context: BuildContext) -> Callable[..., Any] | None:
        from pitlane.kernels import ops
        from pitlane.kernels.cuda import device

        kernels: dict[str, Callable[..., Any]] = {"rms_norm": ops.rms_norm, "silu_mul": ops.silu_mul}
        if device.serves(context.device):
            from pitlane.kernels.cuda import activations, norms, rope, sampling

            kernels = {
                "rms_norm": norms.rms_norm,
                "silu_mul": activations.silu_mul,
                "gelu_mul": activations.gelu_mul,
                "add_rms_norm": norms.add_rms_norm,
                "rope_store": rope.rope_store,
                "sample": sampling.sample,
            }
        return kernels.get(kind)
