"""Layers as plain classes, and the core's plans for dense parts: how it builds a part, and the bytes that the part takes.

Knows no architecture, no batch and no KV. Weights are [out, in] as in checkpoints. A `Linear` may fuse several
linears of the checkpoint and concatenate their outputs: q, k, v, or gate, up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, NormPart, Part, Tensors


class Linear(Protocol):
    """A callable x [T, in] -> y [T, out]. y is a new tensor. The plan of the hook `build_linear` builds a Linear.

    y has the dtype of x. A Linear may also have a method `wide`: it returns y in float32, with sums that are not rounded to the
    dtype of x. The model calls `wide` for the residual stream and the logits.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


def wide(linear: Linear, x: Tensor) -> Tensor:
    """Return linear(x) for the residual stream or as logits: in float32 if the linear has a method `wide`, else in x's dtype."""
    method: Linear | None = getattr(linear, "wide", None)
    return linear(x) if method is None or x.dtype.itemsize > 2 else method(x)


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


class Experts:
    """The linears of all experts, weight [E, out, in]. Rows x [T, in] are sorted by expert: rows [offsets[e], offsets[e + 1])."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        groups = x.tensor_split(offsets[1:-1].cpu())
        return torch.cat([F.linear(rows, weight) for rows, weight in zip(groups, self.weight, strict=True)])


class Embedding:
    """Token ids [T] -> [T, hidden]. On a CPU the table is a view of the file, unless a plugin changes it. A lookup casts its rows.

    linear: the head over the same table, on a device other than the CPU.
    """

    linear: Linear

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight).to(self.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over rows [T, D], in the weight's dtype.

    ATen computes half dtypes in float32, other dtypes in their own precision. A float32 x with a half weight is rounded once.
    """
    if x.dtype == weight.dtype:
        return F.rms_norm(x, tuple(weight.shape), weight, eps)
    return F.rms_norm(x, tuple(weight.shape), weight.to(x.dtype), eps).to(weight.dtype)


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
    """The operations that a lane's model calls. A plugin may replace any of them (`build_op`).

    The fused operations have no core version: where a plugin gives none, the model calls the plain operations in turn.
    add_rms_norm: see `add_norm`. rope_store: qk [T, H + Hkv, D], v [T, Hkv, D], cos and sin [T, 1, D], keys and values
    [Hkv, S, D] of a dense store, slots [T] -> qk rotated; writes the rotated keys and v to the slots.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    silu_mul: Callable[[Tensor], Tensor] = silu_mul
    gelu_mul: Callable[[Tensor], Tensor] = gelu_mul
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
    rope_store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def has_fused(self) -> bool:
        """Whether a plugin gives a fused operation."""
        return self.add_rms_norm is not None or self.rope_store is not None

    def add_norm(self, x: Tensor, out: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + out, in x's dtype, and its norm, in the weight's dtype; both [T, D]. May write the sum into x."""
        if self.add_rms_norm is not None:
            return self.add_rms_norm(x, out, weight, eps)
        x += out
        return x, self.rms_norm(x, weight, eps)


def dense_plan(part: Part, context: BuildContext, is_mapped: bool) -> LinearPlan:
    """The core's plan for a part. is_mapped: the stored tensors are views of a file, which take no memory."""
    dtype, device = context.dtype, context.device
    if isinstance(part, LinearPart):
        num_bytes = part.num_values * dtype.itemsize
        is_copied = len(part.members) > 1 or dtype != context.stored_dtype  # before oneDNN makes its reordered copy
        copies = 2 if is_copied and device.type == "cpu" else 1
        build = _build_experts if part.num_experts else _build_linear
        return LinearPlan(num_bytes, copies * num_bytes, partial(build, part, dtype, device))
    num_bytes = part.num_parameters * dtype.itemsize
    if not isinstance(part, EmbeddingPart):
        return LinearPlan(num_bytes, num_bytes, partial(_build_tensor, part, dtype, device))
    is_view, has_head = device.type == "cpu" and is_mapped, part.is_tied and device.type != "cpu"
    if part.is_tied and is_view:
        num_bytes = 0  # the table stays in the file; the head has its own copy
    return LinearPlan(num_bytes, num_bytes, partial(_build_embedding, context, is_view, has_head), has_head)


def _build_linear(part: LinearPart, dtype: torch.dtype, device: torch.device, tensors: list[Tensors]) -> DenseLinear:
    bias = torch.cat([member["bias"].to(device, dtype) for member in tensors]) if part.bias else None
    weights = [member["weight"] for member in tensors]
    if len(weights) > 1:
        return DenseLinear(_joined(part, weights, dtype, device), bias)
    weight = weights[0].to(device, dtype)
    return DenseLinear(weight.clone() if weight is weights[0] and not can_pack(weight) else weight, bias)


def _build_experts(part: LinearPart, dtype: torch.dtype, device: torch.device, tensors: list[Tensors]) -> Experts:
    weight = _joined(part, [member["weight"] for member in tensors], dtype, device)
    return Experts(weight.view(part.num_experts, -1, part.in_features))


def _joined(part: LinearPart, weights: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of the members in one tensor. Casts member by member, so that no cast copy stays."""
    joined = torch.empty(part.out_features, part.in_features, dtype=dtype, device=device)
    for rows, weight in zip(joined.split([member.out_features for member in part.members]), weights, strict=True):
        rows.copy_(weight)
    return joined


def _build_tensor(part: Part, dtype: torch.dtype, device: torch.device, tensors: list[Tensors]) -> Tensor:
    (tensor,) = tensors[0].values()
    if isinstance(part, NormPart) and part.offset:
        tensor = (tensor.float() if tensor.dtype.itemsize < 4 else tensor) + part.offset
    return tensor.to(device, dtype, copy=True)


def _build_embedding(context: BuildContext, is_view: bool, has_head: bool, tensors: list[Tensors]) -> Embedding:
    table = tensors[0]["weight"]
    embedding = Embedding(table if is_view else table.to(context.device, context.dtype), context.dtype)
    if has_head:
        embedding.linear = DenseLinear(embedding.weight)
    return embedding
