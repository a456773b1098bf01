"""The interface of a format: the tensors of a linear with their dtypes and shapes, and the function that reads them.

The module of a format has a class `Reader`. `folder.py` compares the files with its specs before it reads a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import short
from pitlane.engine.models.quantized.packing import PackedWeight, Packing

FLOATS = ("F32", "F16", "BF16")
Get: TypeAlias = Callable[[str], Tensor]  # last part of a tensor's name -> the tensor


class Spec(NamedTuple):
    """A tensor of a linear. dtypes: the allowed dtypes, as safetensors spells them. shapes: the allowed shapes."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_needed: bool = True


class Reader(Protocol):
    """Reads a format, under the values of one `quantization_config`."""

    def packing_of(self, name: str, inputs: int) -> Packing | None:
        """Return how a linear is stored; None: dense. Raises ModelError for sizes that do not fit."""

    def specs(self, packing: Packing, outputs: int, inputs: int) -> Mapping[str, Spec]:
        """Return the specs of a linear's tensors, by the last part of their names. The first tensor holds the numbers."""

    def read(self, packing: Packing, outputs: int, inputs: int, get: Get) -> PackedWeight:
        """Return the stored numbers. get: reads a tensor that fits its spec; raises KeyError for an absent tensor."""


class BadTensor(ModelError):
    """A tensor holds values that do not fit the config. The message begins with the last part of the tensor's name."""


def whole_groups(method: str, size: int, inputs: int, name: str) -> int:
    """Return the number of inputs per scale. size -1: a scale serves all inputs. Raises ModelError."""
    if size == -1:
        return inputs
    if size < 1 or inputs % size:
        raise ModelError(
            f"group_size must divide the inputs of every quantized linear, got {size} and {inputs} ({name}); "
            f"correct group_size in the quantization_config of {method}"
        )
    return size


def groups_of(packing: Packing, inputs: int, get: Get, name: str) -> Tensor | None:
    """Return the group of every input, int64 [K]; None if the inputs are in the order of their groups, or no tensor is stored.

    name: the last part of the tensor's name. Raises BadTensor.
    """
    try:
        groups = get(name).to(torch.int64)
    except KeyError:
        return None
    in_order = torch.arange(inputs) // packing.group_size
    if torch.equal(groups, in_order):
        return None
    if not packing.is_permuted:
        raise BadTensor(f"{name} permutes the inputs, and the config says desc_act false; set desc_act to true")
    if not torch.equal(groups.sort().values, in_order):
        count, size = inputs // packing.group_size, packing.group_size
        raise BadTensor(f"{name} must name each of {count} groups {size} times; download the model again")
    return groups


def checked_bits(method: str, bits: int | None, known: tuple[int, ...]) -> int:
    if bits not in known:
        raise UnsupportedModel(
            f"the checkpoint is quantized ({method}) with bits {short(bits)}, which is not supported; "
            f"known bits: {', '.join(map(str, known))}"
        )
    return bits


def pattern(method: str, key: str, value: str, *prefixes: str) -> re.Pattern[str]:
    """The regular expression behind the prefix of a value. Raises UnsupportedModel for a text that is no regular expression."""
    text = value
    for prefix in prefixes:
        text = text.removeprefix(prefix)
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise refuse(method, key, value, f"regular expressions ({' '.join(str(error).split())})") from None


def refuse(method: str, key: str, value: Any, known: str) -> UnsupportedModel:
    """The error for a value of a `quantization_config` that no reader knows."""
    return UnsupportedModel(
        f"the checkpoint is quantized ({method}) with {key} {short(value)}, which is not supported; known: {known}"
    )
