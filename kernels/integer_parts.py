"""The parts of a model in 8 or 4 bits, for the plugins `int8` and `int4`: their bytes, and the linear or embedding that is built.

Knows no plugin. A part is planned without a tensor, and built from the tensors of its members: weight [N, K], bias [N]. A head that
keeps bfloat16 is packed for the kernel of bfloat16, as `packed_linear` packs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    build: Callable[[Members], Any]
    has_head: bool
    batch_invariant: bool


class Linear(Protocol):
    """A linear part: its name and sizes."""

    @property
    def name(self) -> str: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def bias(self) -> bool: ...


class Table(Protocol):
    """An embedding part: its name and sizes."""

    @property
    def name(self) -> str: ...

    @property
    def num_embeddings(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def is_tied(self) -> bool: ...


class Context(Protocol):
    """The model that is built: its dtype, the dtype of the stored tensors, its device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def stored_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class Ends(Protocol):
    """Options of a plugin: `int8` or `bfloat16` for the head and the embedding, and for the inputs of linears."""

    @property
    def head(self) -> str: ...

    @property
    def activations(self) -> str: ...


class Copies(Protocol):
    """Packed tensors of parts, kept from an earlier load."""

    def load(self, part: str) -> dict[str, Tensor] | None: ...

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None: ...


class Recipe(NamedTuple):
    """How a model's linears are stored, and its head and embedding; None: they keep the model's dtype.

    copies: makes the store of packed copies of a model, from a text that says how its parts are packed; None: there is no store.
    """

    form: Format
    head: Format | None
    copies: Callable[[str], Copies | None] = lambda recipe: None

    @classmethod
    def of_ends(cls, options: Ends) -> Recipe:
        """For plugins that plan the linears of the layers themselves: embedding and head in 8 bits, or in the model's dtype."""
        form = Format(8, options.activations == "int8")
        return cls(form, form if options.head == "int8" else None)

    def linear(self, part: Linear, context: Context) -> Planned | None:
        """Plan a linear; None leaves it to the core."""
        sizes = part.out_features, part.in_features, part.bias
        form = self.head if part.name == "lm_head" else self.form
        if form is not None:
            plan = linear_plan(*sizes, form, context.dtype, context.device)
            return plan._replace(build=self._kept(part.name, form, plan, context))
        if unsupported(context.dtype, context.device) or linear.unavailable() or part.in_features % 2:
            return None
        return bfloat16_plan(*sizes, 1, context.stored_dtype, linear.fastest_products())

    def embedding(self, part: Table, context: Context) -> Planned | None:
        """Plan an embedding; None leaves it to the core."""
        if self.head is None:
            return None
        plan = linear_plan(part.num_embeddings, part.dim, False, self.head, context.dtype, context.device)
        build = partial(_embedding, self._kept(part.name, self.head, plan, context), context.dtype)
        return plan._replace(build=build, has_head=part.is_tied)

    def _kept(self, name: str, form: Format, plan: Planned, context: Context) -> Callable[[Members], Any]:
        """A function that builds a part from its packed copy, or packs it and keeps a copy under a name."""
        linear = plan.build
        if context.device.type != "cpu" or not isinstance(linear, _Linear):
            return linear
        recipe = f"{form.bits} bits" + (f", groups of {form.group_size}" if form.group_size else "")
        recipe += ", symmetric" if form.bits == 4 and form.symmetric else ""

        def build(members: Members) -> Any:
            copies = self.copies(recipe)
            tensors = None if copies is None else copies.load(name)
            made = None if tensors is None else linear.of_copy(tensors, members)
            if made is None:
                made = linear(members)
                if copies is not None:
                    copies.save(name, made.tensors)
            return made

        return build


def bfloat16_plan(
    outputs: int, inputs: int, bias: bool, members: int, stored_dtype: torch.dtype, products: str
) -> Planned:
    """Plan a linear [outputs, inputs] of some members in bfloat16, for the kernel in C."""
    num_bytes = linear.packed_bytes(outputs, inputs) + 2 * bias * outputs
    copies = (members > 1) + (stored_dtype != torch.bfloat16)  # the fused weight, the cast weights
    return Planned(num_bytes, num_bytes + copies * 2 * outputs * inputs, partial(_packed, products), False, True)


def linear_plan(
    outputs: int, inputs: int, bias: bool, form: Format, dtype: torch.dtype, device: torch.device
) -> Planned:
    """Plan a linear [outputs, inputs] of a model in a dtype."""
    level = chosen_level(form, inputs, dtype, device)
    num_bytes = form.num_bytes(outputs, inputs) + 4 * bias * outputs
    build = _Linear(outputs, inputs, form, level, device)
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


def rounded_plan(
    num_values: int, dtype: torch.dtype, device: torch.device, codes: Callable[[Members], Codes]
) -> Planned:
    """Plan a linear whose codes no kernel runs: its rounded weight is dense, for quality only."""
    num_bytes = num_values * dtype.itemsize
    return Planned(num_bytes, num_bytes + 6 * num_values, partial(_rounded, codes, dtype, device), False, False)


@dataclass(slots=True, frozen=True)
class _Linear:
    """Builds a linear from its members, or from a packed copy."""

    outputs: int
    inputs: int
    form: Format
    level: int | None
    device: torch.device

    def __call__(self, members: Members) -> Quantized:
        weights = [member["weight"] for member in members]
        return Quantized(self.outputs, self.inputs, self.form, weights, _bias(members), self.level, device=self.device)

    def of_copy(self, tensors: Mapping[str, Tensor], members: Members) -> Quantized | None:
        """None if the copy has other shapes or dtypes."""
        return Quantized.filled(self.outputs, self.inputs, self.form, tensors, _bias(members), self.level)


def _bias(members: Members) -> Tensor | None:
    biases = [member["bias"].float() for member in members if "bias" in member]
    return torch.cat(biases) if biases else None


def _coded(
    outputs: int,
    inputs: int,
    form: Format,
    level: int | None,
    device: torch.device,
    codes: Callable[[Members], Codes],
    members: Members,
) -> Quantized:
    chosen = codes(members)
    if device.type != "cpu":
        zeros = chosen.zeros if chosen.zeros is None else chosen.zeros.to(device)
        chosen = Codes(chosen.codes.to(device), chosen.scales.to(device), zeros)
    return Quantized(outputs, inputs, form, chosen, _bias(members), level, device=device)


def _rounded(codes: Callable[[Members], Codes], dtype: torch.dtype, device: torch.device, members: Members) -> Any:
    weight = codes(members).dequantized().to(device, dtype)
    biases = [member["bias"].to(device, dtype) for member in members if "bias" in member]
    return partial(torch.nn.functional.linear, weight=weight, bias=torch.cat(biases) if biases else None)


def _embedding(build: Callable[[Members], Any], dtype: torch.dtype, members: Members) -> Embedding:
    return Embedding(build(members), dtype)


def _packed(products: str, members: Members) -> linear.Packed:
    weights = [member["weight"].to(torch.bfloat16) for member in members]
    biases = [member["bias"].to(torch.bfloat16) for member in members if "bias" in member]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return linear.Packed(weight, torch.cat(biases) if biases else None, products)
