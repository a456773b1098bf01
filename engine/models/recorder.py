"""PartMaker: the methods with which a decoder class names its parts. Recorder: collects the parts and reads no tensor.

A decoder class runs twice: against the recorder, then against the `Builder` (builder.py). Both get their parts from the same
methods of `PartMaker`, so the recorded parts are the built parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from pitlane.engine.models.layers import Embedding, Linear
from pitlane.engine.models.parts import EmbeddingPart, Feed, LinearPart, Member, NormPart, Part, TensorPart


class PartMaker:
    """Makes the parts that a decoder class asks for. A subclass defines `make`: it returns the object in the place of a part."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def make(self, part: Part) -> Any:
        raise NotImplementedError

    def linear(
        self,
        in_features: int,
        outputs: Mapping[str, int],
        *,
        bias: bool = False,
        split: Literal["out", "in"] | None = None,
        tied_to: str | None = None,
        fed_by: Feed | None = None,
    ) -> Linear:
        """A linear over the members `outputs` {name: out_features}, fused in this order."""
        members = tuple(Member(name, size) for name, size in outputs.items())
        linear: Linear = self.make(LinearPart(members, in_features, bias, split, tied_to, fed_by=fed_by))
        return linear

    def experts(self, names: Sequence[str], in_features: int, out_features: int) -> Any:
        """The linears of all experts as one callable: rows [T, in] sorted by expert, offsets [E + 1] -> [T, out]."""
        members = tuple(Member(name, out_features) for name in names)
        return self.make(LinearPart(members, in_features, num_experts=len(names)))

    def norm(self, name: str, size: int, offset: float = 0.0) -> Tensor:
        """Weight [size] of a norm, `offset` included."""
        weight: Tensor = self.make(NormPart(name, size, offset))
        return weight

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor by its full name."""
        tensor: Tensor = self.make(TensorPart(name, shape))
        return tensor

    def embedding(self, name: str, num_embeddings: int, dim: int, tied: bool) -> Embedding:
        """A callable: token ids [T] -> [T, dim]."""
        embedding: Embedding = self.make(EmbeddingPart(name, num_embeddings, dim, tied))
        return embedding


class Recorder(PartMaker):
    """Collects parts. In the place of a tensor it returns zeros that take no memory."""

    def __init__(self) -> None:
        super().__init__(torch.float32, torch.device("cpu"))
        self.parts: list[Part] = []

    def make(self, part: Part) -> Any:
        self.parts.append(part)
        if isinstance(part, (NormPart, TensorPart)):
            (shape,) = part.shapes.values()
            return torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
        return None


def shapes_in(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name."""
    return {name: shape for part in parts for name, shape in part.shapes.items()}


def num_parameters(parts: Sequence[Part]) -> int:
    """Count every number of a checkpoint once."""
    return sum(prod(shape) for shape in shapes_in(parts).values())
