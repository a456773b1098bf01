"""Packed checkpoint: the linears of a quantized checkpoint run on Pitlane's kernels, from the numbers in its files.

Changes in the loop: `build_linear` uses the stored numbers of GPTQ, AWQ, compressed-tensors and FP8 checkpoints (docs/formats.md).
Linears of 4 bits in groups of 32 inputs or a multiple run on the kernel of `int4`. Linears of 8 bits with a scale per output run on
the kernel of `int8`, and float8 on the kernel of `fp8`. A linear with act-order permutes its inputs first. All other linears are
decoded to the model's dtype; `stats.notes` and a warning say so. Without the plugin, all linears are decoded. Inputs stay in the
model's dtype, even if the checkpoint asks for rounded inputs. With `activations` = int8, the integer kernels round the inputs, with
a scale per token and group.
Exactness: rounding. The kernels compute with the weights of the files, and add in float32 in another order. Decoded weights are
also rounded to the model's dtype (2^-9 in bfloat16). With zero points, the kernel for 4 bits keeps scale * zero in float16, within
2^-12. With `activations` = int8 the plugin is approximate, as `int8` and `int4` are.
Costs: time to repack at load. Helps if a step waits for the reading of weights: a decode step reads 4.5 or 8 bits per weight.
Source: the libraries of the formats (AutoGPTQ, AutoAWQ, compressed-tensors)
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pitlane import Plugin, PluginOptions, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import BuildContext, Exactness, Lane, LinearPart, LinearPlan, PackedTensors, Packing, Sequence, Tensors
    from pitlane.kernels.packing import Format

log = logging.getLogger("pitlane")


class PackedCheckpoint(Plugin):
    name, role, exactness = "packed_checkpoint", "linear", "rounding"
    is_default = batch_invariant = True

    class Options(PluginOptions):
        activations: Literal["bfloat16", "int8"] = Field(
            "bfloat16",
            title="Activations",
            description="bfloat16 keeps the inputs of a linear in the model's dtype; int8 rounds them to 8 bits",
        )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.last_summary: tuple[BuildContext, dict[str, Any]] | None = None

    @classmethod
    def exactness_for(cls, options: PluginOptions) -> Exactness:
        return "approximate" if getattr(options, "activations", "") == "int8" else "rounding"

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        return None if context.packings else "the checkpoint is not quantized"

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        """Add the products of dense linears, because KV depends on them."""
        from pitlane.kernels.linear import fastest_products

        return f"{super().key_of(options)} {fastest_products()}"

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        packings = {context.packings.get(member.name) for member in part.members}
        packing = packings.pop()
        if packings or (packing is not None and packing.is_permuted and len(part.members) > 1):
            return None  # the engine then calls the hook for every member
        if packing is None:
            return self._dense(part, context)
        if packing.is_float:
            return self._float8(part, packing, context)
        form = _form(packing, part.in_features, self.options.activations == "int8")
        if form is None:
            _warn(f"linears with {packing} have no kernel: they are decoded to the model's dtype")
            return self._dense(part, context)
        return self._packed(part, packing, form, context)

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        context = lane.built.context
        if self.last_summary is None or self.last_summary[0] is not context:
            self.last_summary = context, summary(context)
        seq.notes[self.name] = self.last_summary[1]

    def _packed(self, part: LinearPart, packing: Packing, form: Format, context: BuildContext) -> LinearPlan:
        from pitlane import LinearPlan
        from pitlane.kernels.integer_parts import linear_plan

        plan = linear_plan(part.out_features, part.in_features, part.bias, form, context.dtype, context.device)
        numbers = 6 * part.num_values  # the stored numbers and their codes, both in memory during the build
        build = partial(_build_packed, part, form, context)
        return LinearPlan(plan.num_bytes, plan.peak_bytes + numbers, build, batch_invariant=plan.batch_invariant)

    def _float8(self, part: LinearPart, packing: Packing, context: BuildContext) -> LinearPlan:
        from pitlane import LinearPlan
        from pitlane.kernels.fp8 import chosen_level, num_bytes

        inputs, group = part.in_features, packing.group_size
        level = chosen_level(inputs, group, context.dtype, context.device)
        size = num_bytes(part.out_features, inputs, group, context.device) + 4 * part.bias * part.out_features
        build = partial(_build_float8, part, packing, level, context)
        return LinearPlan(size, size + 3 * part.num_values, build, batch_invariant=level is not None)

    def _dense(self, part: LinearPart, context: BuildContext) -> LinearPlan:
        from pitlane import LinearPlan
        from pitlane.kernels.stored import dense_bytes, is_packed

        place = context.dtype, context.device
        num_bytes = dense_bytes(part.out_features, part.in_features, *place) + part.bias * part.out_features * 4
        copies = 2 * context.dtype.itemsize * part.num_values
        return LinearPlan(
            num_bytes,
            num_bytes + copies,
            partial(_build_dense, part, context),
            batch_invariant=is_packed(part.in_features, *place),
        )


def summary(context: BuildContext) -> dict[str, Any]:
    """The number of linears per packing that run on a kernel, and that are decoded.

    Without packings in the context, a plugin changes the weights, and all linears are dense.
    """
    from pitlane import LinearPart, parts_of

    counts: Counter[str] = Counter()
    for part in parts_of(context.config):
        if not isinstance(part, LinearPart) or part.tied_to is not None:
            continue
        for member in part.members:
            packing = context.packings.get(member.name)
            if not context.packings:
                counts["dense, because a plugin changes weights"] += 1
            elif packing is not None:
                has_kernel = packing.is_float or _form(packing, part.in_features, False) is not None
                counts[f"{packing}: {'kernel' if has_kernel else 'decoded'}"] += 1
    return dict(counts)


def _form(packing: Packing, inputs: int, quantized: bool) -> Format | None:
    from pitlane.kernels.stored import kernel_form

    if packing.rows != 1:
        return None
    return kernel_form(packing.bits, packing.group_size, inputs, packing.symmetric, quantized)


def _build_packed(part: LinearPart, form: Format, context: BuildContext, tensors: list[PackedTensors]) -> Any:
    from pitlane.kernels.quantized import Quantized, chosen_level
    from pitlane.kernels.stored import Permuted, StoredWeight, codes_of

    weights = [StoredWeight(*member.packed[1:]) for member in tensors]
    codes, order = codes_of(weights, form)
    del weights
    level = chosen_level(form, part.in_features, context.dtype, context.device)
    sizes = part.out_features, part.in_features
    linear = Quantized(*sizes, form, codes, _bias(part, tensors), level, device=context.device)
    return linear if order is None else Permuted(linear, order.to(context.device))


def _build_float8(
    part: LinearPart, packing: Packing, level: int | None, context: BuildContext, tensors: list[PackedTensors]
) -> Any:
    import torch

    from pitlane.kernels.fp8 import Float8, Fp8Linear

    parts = []
    for member in tensors:
        weight = member.packed
        lines = torch.arange(len(weight.numbers)) // packing.rows
        parts.append(Float8(weight.numbers, weight.scales.float()[lines], packing.group_size))
    return Fp8Linear(parts, _bias(part, tensors), level, context.device)


def _build_dense(part: LinearPart, context: BuildContext, tensors: list[Tensors]) -> Any:
    import torch

    from pitlane.kernels.stored import dense_linear

    bias = _bias(part, tensors)
    weights = [member["weight"].to(context.dtype) for member in tensors]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return dense_linear(weight, None if bias is None else bias.to(context.dtype), context.device)


def _bias(part: LinearPart, tensors: list[Any]) -> Tensor | None:
    import torch

    return torch.cat([member["bias"].float() for member in tensors]) if part.bias else None


@cache
def _warn(line: str) -> None:
    log.warning("packed_checkpoint: %s", line)
