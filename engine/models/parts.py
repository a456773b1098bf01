"""Parts: the weights of a model as data. The decoder class names its parts; no tensor is read.

A part is a linear, a norm, an embedding or another tensor. A linear may fuse several linears of the checkpoint, its members.
Names are canonical: the names of a Llama checkpoint. Weights are [out, in]. A `LinearPlan` says how a part is built.
Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = Mapping[str, "Tensor"]  # last part of the name -> tensor as stored: weight [out, in], bias [out]


class Member(NamedTuple):
    """A linear of the checkpoint inside a LinearPart."""

    name: str
    out_features: int


class Feed(NamedTuple):
    """The part whose outputs are the inputs of a linear, channel by channel, up to operations that keep a channel's factor.

    name: of a norm (is_norm) or of a linear. A factor on an output of that part is the same factor on the inputs that it feeds.
    groups, repeats: the outputs are `groups` runs of equal length, and every run feeds `repeats` runs of inputs, side by side. So a
    value head feeds the inputs of the output projection that the query heads of its group fill.
    """

    name: str
    groups: int = 1
    repeats: int = 1
    is_norm: bool = False


class _Part:
    """shapes: full name of every tensor of the checkpoint -> its shape."""

    __slots__ = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True)
class LinearPart(_Part):
    """A linear x [T, in] -> y [T, out]. The outputs of the members lie side by side, in their order.

    bias: every member has a bias. split: how ranks may divide the weight: by outputs, by inputs, or not at all. tied_to: name of
    the embedding whose table is the weight; the part then has no tensor of its own. num_experts: the number of members if every
    member is an expert; the linear then takes rows sorted by expert. 0: no experts. fed_by: the part whose outputs are the inputs;
    None: no single part, or the factor of a channel would not pass.
    """

    members: tuple[Member, ...]
    in_features: int
    bias: bool = False
    split: Literal["out", "in"] | None = None
    tied_to: str | None = None
    num_experts: int = 0
    fed_by: Feed | None = None

    @property
    def name(self) -> str:
        """The name of the first member. The other members follow with the last part of their names: `...q_proj+k_proj+v_proj`."""
        return "+".join([self.members[0].name, *(member.name.rpartition(".")[2] for member in self.members[1:])])

    @property
    def out_features(self) -> int:
        return sum(member.out_features for member in self.members)

    @property
    def num_values(self) -> int:
        """Numbers in weight and bias. A tied linear counts its weight too."""
        return self.out_features * (self.in_features + self.bias)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.tied_to is not None:
            return {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in self.members:
            shapes[f"{name}.weight"] = (size, self.in_features)
            if self.bias:
                shapes[f"{name}.bias"] = (size,)
        return shapes

    def alone(self, member: Member) -> LinearPart:
        """Return the part that has only this member."""
        return LinearPart((member,), self.in_features, self.bias, self.split, self.tied_to, fed_by=self.fed_by)


@dataclass(frozen=True, slots=True)
class NormPart(_Part):
    """The weight [size] of a norm. offset: added to the stored weight in float32."""

    name: str
    size: int
    offset: float = 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.size,)}


@dataclass(frozen=True, slots=True)
class TensorPart(_Part):
    """Any other tensor. name: its full name, `.weight` included."""

    name: str
    shape: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}


@dataclass(frozen=True, slots=True)
class EmbeddingPart(_Part):
    """Token ids [T] -> [T, dim]. is_tied: the head reads the same table [num_embeddings, dim]."""

    name: str
    num_embeddings: int
    dim: int
    is_tied: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.num_embeddings, self.dim)}


Part: TypeAlias = LinearPart | NormPart | TensorPart | EmbeddingPart


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How a part will be built, and its bytes. Made without a tensor.

    num_bytes: memory of the finished part. peak_bytes: most memory while `build` runs, the finished part included, the stored
    tensors excluded. build: makes the part from the tensors of each member. has_head: the part is a tied embedding, and its
    attribute `linear` is the head over the same table; `num_bytes` counts both. batch_invariant: a row's result does not depend on
    the other rows; None: as the plugin declares.
    """

    num_bytes: int
    peak_bytes: int
    build: Callable[[list[Tensors]], Any]
    has_head: bool = False
    batch_invariant: bool | None = None

    @classmethod
    def of(cls, fields: Any) -> LinearPlan | None:
        """Make a plan of a named tuple with the same fields, as the kernels make it; None stays None."""
        return None if fields is None else cls(**fields._asdict())
