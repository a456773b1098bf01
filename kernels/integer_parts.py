"""The parts of a model in 8 or 4 bits, for the plugins `int8` and `int4`: their bytes, and the linear or embedding that is built.

Knows no plugin. A part is planned without a tensor, and built from the tensors of its members: weight [N, K], bias [N]. A head that
keeps bfloat16 is packed for the kernel of bfloat16, as `packed_linear` packs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pitlane.kernels import linear
from pitlane.kernels.extension import unsupported
from pitlane.kernels.packing import Format
from pitlane.kernels.quantize_math import Codes
from pitlane.kernels.quantized import Quantized, chosen_level, peak_bytes

Members: TypeAlias = Sequence[Mapping[str, Tensor]]


class Embedding:
    """Token ids [T] -> [T, K], rows of an 8-bit weight. linear: the head over the same table."""

    def __init__(self, linear: Quantized, dtype: torch.dtype) -> None:
        self.linear, self.dtype = linear, dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.linear.rows(token_ids).to(self.dtype)


class Planned(NamedTuple):
    """How a part will be built, with the field names of the face's `LinearPlan`.

    num_bytes: of the finished part. peak_bytes: most memory while `build` runs, the stored tensors excluded. has_head: the part is
    an embedding that holds the head. batch_invariant: a row's result does not depend on the other rows.
    """

    num_bytes: int
    peak_bytes: int
    build: Callable[[Members], Quantized | Embedding | linear.Packed]
    has_head: bool
    batch_invariant: bool


class Linear(Protocol):
    """The sizes of a linear part."""

    name: str
    out_features: int
    in_features: int
    bias: bool


class Table(Protocol):
    """The sizes of an embedding part."""

    num_embeddings: int
    dim: int
    is_tied: bool


class Context(Protocol):
    """The model that is built: its dtype, the dtype of the stored tensors, its device."""

    dtype: torch.dtype
    stored_dtype: torch.dtype
    device: torch.device


class Recipe(NamedTuple):
    """How a model's linears are stored, and its head and embedding; None: they keep the model's dtype."""

    form: Format
    head: Format | None

    def linear(self, part: Linear, context: Context) -> Planned | None:
        """Plan a linear; None leaves it to the core."""
        sizes = part.out_features, part.in_features, part.bias
        form = self.head if part.name == "lm_head" else self.form
        if form is not None:
            return linear_plan(*sizes, form, context.dtype, context.device)
        if unsupported(context.dtype, context.device) or linear.unavailable() or part.in_features % 2:
            return None
        return bfloat16_plan(*sizes, 1, context.stored_dtype, linear.has_amx())

    def embedding(self, part: Table, context: Context) -> Planned | None:
        """Plan an embedding; None leaves it to the core."""
        sizes = part.num_embeddings, part.dim, part.is_tied
        return None if self.head is None else embedding_plan(*sizes, self.head, context.dtype, context.device)


def bfloat16_plan(outputs: int, inputs: int, bias: bool, members: int, stored_dtype: torch.dtype, amx: bool) -> Planned:
    """Plan a linear [outputs, inputs] of some members in bfloat16, for the kernel in C."""
    num_bytes = linear.packed_bytes(outputs, inputs) + 2 * bias * outputs
    copies = (members > 1) + (stored_dtype != torch.bfloat16)  # the fused weight, the cast weights
    return Planned(num_bytes, num_bytes + copies * 2 * outputs * inputs, partial(_packed, amx), False, True)


def linear_plan(
    outputs: int, inputs: int, bias: bool, form: Format, dtype: torch.dtype, device: torch.device
) -> Planned:
    """Plan a linear [outputs, inputs] of a model in a dtype."""
    level = chosen_level(form, inputs, dtype, device)
    num_bytes = form.num_bytes(outputs, inputs) + 4 * bias * outputs
    build = partial(_linear, outputs, inputs, form, level, device)
    return Planned(num_bytes, num_bytes + peak_bytes(inputs), build, False, level is not None or form.quantized)


def codes_plan(
    outputs: int,
    inputs: int,
    bias: bool,
    form: Format,
    dtype: torch.dtype,
    device: torch.device,
    codes: Callable[[Members], Codes],
) -> Planned:
    """Plan a linear whose codes are chosen already. codes: returns those of the whole weight; called once, at load."""
    plan = linear_plan(outputs, inputs, bias, form, dtype, device)
    level = chosen_level(form, inputs, dtype, device)
    peak = plan.peak_bytes + outputs * inputs
    return plan._replace(peak_bytes=peak, build=partial(_coded, outputs, inputs, form, level, device, codes))


def embedding_plan(
    rows: int, dim: int, is_tied: bool, form: Format, dtype: torch.dtype, device: torch.device
) -> Planned:
    """Plan an embedding [rows, dim] in 8 bits; if it is tied, it holds the head."""
    plan = linear_plan(rows, dim, False, form, dtype, device)
    return plan._replace(build=partial(_embedding, plan.build, dtype), has_head=is_tied)


def _linear(
    outputs: int, inputs: int, form: Format, level: int | None, device: torch.device, members: Members
) -> Quantized:
    biases = [member["bias"].float() for member in members if "bias" in member]
    weights = [member["weight"] for member in members]
    return Quantized(outputs, inputs, form, weights, torch.cat(biases) if biases else None, level, device=device)


def _coded(
    outputs: int,
    inputs: int,
    form: Format,
    level: int | None,
    device: torch.device,
    codes: Callable[[Members], Codes],
    members: Members,
) -> Quantized:
    biases = [member["bias"].float() for member in members if "bias" in member]
    chosen = codes(members)
    if device.type != "cpu":
        chosen = Codes(*(part if part is None else part.to(device) for part in chosen))
    return Quantized(outputs, inputs, form, chosen, torch.cat(biases) if biases else None, level, device=device)


def _embedding(build: Callable[[Members], Any], dtype: torch.dtype, members: Members) -> Embedding:
    return Embedding(build(members), dtype)


def _packed(amx: bool, members: Members) -> linear.Packed:
    weights = [member["weight"].to(torch.bfloat16) for member in members]
    biases = [member["bias"].to(torch.bfloat16) for member in members if "bias" in member]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return linear.Packed(weight, torch.cat(biases) if biases else None, amx)
