"""Layers as plain classes, and the builder that fills them from a source of weights.

Knows no architecture, no batch and no KV. Weights are [out, in] as in checkpoints. A `Linear` may fuse several
linears of the checkpoint and concatenate their outputs: q, k, v, or gate, up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.models.weights import WeightSource


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One linear of the checkpoint. tensors: last part of the name -> tensor as stored (weight [out, in], bias, scales, ...)."""

    name: str
    tensors: Mapping[str, Tensor]
    in_features: int
    out_features: int


class Linear(Protocol):
    """A callable x [T, in] -> y [T, out]. y is a new tensor. The hook `build_linear` returns a Linear."""

    def __call__(self, x: Tensor) -> Tensor: ...


BuildLinear = Callable[[list[LinearPart]], "Linear | None"]
# Smallest weight, in elements, that we reorder for oneDNN. Below it `F.linear` is faster. Float32, M = 1, 2 cores:
# 384 x 128: oneDNN 15 us, `F.linear` 7 us. 512 x 512: 24 and 25 us.
MIN_PACKED = 2**17
MIN_ROWS = 5  # see DenseLinear


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can reorder this weight and is faster with it: on a CPU, float32 or bfloat16, and not small."""
    dtype = weight.dtype
    if weight.device.type != "cpu" or weight.numel() < MIN_PACKED or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class DenseLinear:
    """A linear in the model's dtype. Its weight is reordered for oneDNN if `can_pack` says so.

    Time as a fraction of `F.linear`, on llama-1b's shapes (2 cores with AVX-512 BF16, weights not in the cache). bfloat16:
    0.61-0.73 at M = 1 to 16 (28 GB/s at 1), 0.85-0.88 at 64, 0.94-0.97 at 512. float32: 0.65 at M = 1, 0.28-0.44 at 16,
    0.73-0.87 at 512. A bfloat16 input is padded with zeros to `MIN_ROWS` rows. A decode step of llama-1b then takes 0.81 of
    the time without padding (4 rows: 0.86, 6 rows: 0.89, 8 rows: 1.0).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.min_rows = MIN_ROWS if weight.dtype == torch.bfloat16 else 1
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if rows < self.min_rows:
            x = F.pad(x, (0, 0, 0, self.min_rows - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y[:rows]


class Concat:
    """Applies several linears to one input and concatenates their outputs."""

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)


class Embedding:
    """Token ids [T] -> [T, hidden]. On a CPU the table is a view of the file; a lookup casts its rows."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight).to(self.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over rows [T, D]. ATen computes half dtypes in float32, other dtypes in their own precision."""
    return F.rms_norm(x, tuple(weight.shape), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I] -> silu(gate) * up [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I] -> gelu(gate) * up [T, I], gelu in its tanh form."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations that a lane's model calls. A plugin may replace any of them (`build_op`)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    silu_mul: Callable[[Tensor], Tensor] = silu_mul
    gelu_mul: Callable[[Tensor], Tensor] = gelu_mul


class Builder:
    """Builds a model layer by layer, so that loading needs little memory beyond the model itself.

    The source must have the names and shapes that the config declares (`weights.checked`). The builder calls `build_linear`
    with all parts of a fused linear. On None, it calls `build_linear` again per part. A declined part becomes a DenseLinear.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        build_linear: BuildLinear | None = None,
        stored_name: Callable[[str], str] = str,
    ) -> None:
        self.source, self.dtype, self.device, self.stored_name = source, dtype, device, stored_name
        self.build_linear = build_linear or (lambda parts: None)
        self.embedding_on_device: Tensor | None = None
        self.names: dict[str, list[str]] = {}
        for name in source.names():
            self.names.setdefault(name.rpartition(".")[0], []).append(name)

    def linear(
        self,
        in_features: int,
        outputs: Mapping[str, int],
        *,
        bias: bool = False,
        split: Literal["out", "in"] | None = None,
        tied_to: str | None = None,
    ) -> Linear:
        """Build one linear from parts {name: out_features}. The outputs follow the order of the parts."""
        parts = [self._part(name, tied_to or name, in_features, out) for name, out in outputs.items()]
        linear = self.build_linear(parts)
        if linear is None and len(parts) > 1:
            linears = [self.build_linear([part]) for part in parts]
            if any(built is not None for built in linears):
                pairs = zip(linears, parts, strict=True)
                linear = Concat([self._dense([part]) if built is None else built for built, part in pairs])
        if linear is None and tied_to is not None and self.embedding_on_device is not None:
            linear = DenseLinear(self.embedding_on_device)
        return self._dense(parts) if linear is None else linear

    def norm(self, name: str, size: int, offset: float = 0.0) -> Tensor:
        """Weight [size] of a norm, plus the offset."""
        weight = self.source.get(self.stored_name(f"{name}.weight"))
        if offset:
            weight = weight.float() + offset if weight.dtype.itemsize < 4 else weight + offset
        return weight.to(self.device, self.dtype, copy=True)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a copy of one tensor in the model's dtype, on its device."""
        return self.source.get(self.stored_name(name)).to(self.device, self.dtype, copy=True)

    def embedding(self, name: str, num_embeddings: int, dim: int, tied: bool) -> Embedding:
        weight = self.source.get(self.stored_name(f"{name}.weight"))
        if self.device.type != "cpu":
            weight = self.embedding_on_device = weight.to(self.device, self.dtype)
        return Embedding(weight, self.dtype)

    def _part(self, name: str, stored: str, in_features: int, out_features: int) -> LinearPart:
        names = self.names[self.stored_name(stored)]
        tensors = {tensor.rpartition(".")[2]: self.source.get(tensor) for tensor in names}
        return LinearPart(name, tensors, in_features, out_features)

    def _dense(self, parts: list[LinearPart]) -> DenseLinear:
        bias = None
        if any("bias" in part.tensors for part in parts):
            bias = torch.zeros(sum(part.out_features for part in parts), dtype=self.dtype, device=self.device)
            _fill(bias, [part.tensors.get("bias") for part in parts], [part.out_features for part in parts])
        if len(parts) == 1:
            stored = parts[0].tensors["weight"]
            weight = stored.to(self.device, self.dtype)
            return DenseLinear(weight.clone() if weight is stored and not can_pack(weight) else weight, bias)
        rows = sum(part.out_features for part in parts)
        weight = torch.empty(rows, parts[0].in_features, dtype=self.dtype, device=self.device)
        _fill(weight, [part.tensors["weight"] for part in parts], [part.out_features for part in parts])
        return DenseLinear(weight, bias)


def _fill(target: Tensor, sources: list[Tensor | None], sizes: list[int]) -> None:
    for rows, source in zip(torch.split(target, sizes), sources, strict=True):
        if source is not None:
            rows.copy_(source)
