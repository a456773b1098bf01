"""Layers as plain classes, and the builder that fills them from a source of weights.

Knows no architecture, no batch and no KV. Weights are [out, in] as in checkpoints. A `Linear` may be fused from several
parts of the checkpoint, with their outputs side by side: q, k, v, or gate, up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.weights import WeightSource


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One linear of the checkpoint. tensors: all tensors under its name, as stored (weight [out, in], bias, scales, ...)."""

    name: str
    tensors: Mapping[str, Tensor]
    in_features: int
    out_features: int


class Linear(Protocol):
    """A callable x [T, in] -> y [T, out], a new tensor. `build_linear` returns it."""

    def __call__(self, x: Tensor) -> Tensor: ...


BuildLinear = Callable[[list[LinearPart]], "Linear | None"]
# Numbers in a weight from which oneDNN is as fast as `F.linear`. Float32, M = 1, 2 cores, oneDNN and `F.linear`:
# 15 and 7 us at 384 x 128, 24 and 25 us at 512 x 512.
MIN_PACKED = 2**17
MIN_ROWS = 5  # see DenseLinear


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can reorder this weight and gains by it: on a CPU, float32 or bfloat16, not small."""
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
    0.73-0.87 at 512. In bfloat16, rows of zeros are added up to `MIN_ROWS`: a decode step of llama-1b then takes 0.81 of
    its time without (0.86 with 4 rows, 0.89 with 6, 1.0 with 8).
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
    """Several linears on the same input, with their outputs side by side."""

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)


class Embedding:
    """Token ids [T] -> [T, hidden]. On a CPU the table stays a view of the file; rows are cast when they are looked up."""

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


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations that a lane's model calls. A plugin may replace any of them (`build_op`)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    silu_mul: Callable[[Tensor], Tensor] = silu_mul


class Builder:
    """Makes a model's layers one after the other, so that loading needs memory for the model and one part of it.

    The source must have the names and shapes that the config declares (`weights.checked`). build_linear is called with
    all parts of a fused linear, and after None with each part alone; a part that it declines becomes a DenseLinear.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        build_linear: BuildLinear | None = None,
    ) -> None:
        self.config, self.source, self.dtype, self.device = config, source, dtype, device
        self.build_linear = build_linear or (lambda parts: None)
        self.embedding_on_device: Tensor | None = None
        self.names: dict[str, list[str]] = {}
        for name in source.names():
            self.names.setdefault(name.rpartition(".")[0], []).append(name)

    def linear(self, in_features: int, parts: Mapping[str, int]) -> Linear:
        """Build one linear from parts {name: out_features}, with their outputs in this order."""
        loaded = [self._part(name, in_features, out) for name, out in parts.items()]
        linear = self.build_linear(loaded)
        if linear is None and len(loaded) > 1:
            linears = [self.build_linear([part]) for part in loaded]
            if any(built is not None for built in linears):
                pairs = zip(linears, loaded, strict=True)
                linear = Concat([self._dense([part]) if built is None else built for built, part in pairs])
        if linear is None:
            linear = self._dense(loaded)
        return linear

    def norm(self, name: str) -> Tensor:
        """Return the weight [D] of a norm."""
        return self.tensor(f"{name}.weight")

    def embedding(self, name: str) -> Embedding:
        weight = self.source.get(f"{name}.weight")
        if self.device.type != "cpu":
            weight = self.embedding_on_device = weight.to(self.device, self.dtype)
        return Embedding(weight, self.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a copy of one tensor in the model's dtype, on its device."""
        return self.source.get(name).to(self.device, self.dtype, copy=True)

    def _part(self, name: str, in_features: int, out_features: int) -> LinearPart:
        stored = name
        if name == "lm_head" and self.config.tie_word_embeddings:
            stored = "model.embed_tokens"
        tensors = {tensor.rpartition(".")[2]: self.source.get(tensor) for tensor in self.names[stored]}
        return LinearPart(name, tensors, in_features, out_features)

    def _dense(self, parts: list[LinearPart]) -> DenseLinear:
        bias = None
        if any("bias" in part.tensors for part in parts):
            bias = torch.zeros(sum(part.out_features for part in parts), dtype=self.dtype, device=self.device)
            _fill(bias, [part.tensors.get("bias") for part in parts], [part.out_features for part in parts])
        if parts[0].name == "lm_head" and self.config.tie_word_embeddings and self.embedding_on_device is not None:
            return DenseLinear(self.embedding_on_device, bias)
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
