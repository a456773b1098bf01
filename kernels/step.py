"""A decode or verify step of a decoder in one C call: embedding rows in, logits out.

A program is a list of operations (`Op`) over plain addresses, for kernels/cpu/step.c. Its linears, attention and row operations
are the C functions of linear.py, quantized.py, attention.py and ops.py. Residuals and logits are float32, as in the core's
decoder; norms of heads and RoPE round as ATen does there. So the logits have the bits of these kernels called one by one. A batch
has at most `MAX_ROWS` rows (tokens). Bytes moved: the weights and the KV that the rows see, each once. kernels/cpu/step.h explains
the fields.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pitlane.kernels.attention import Parts
from pitlane.kernels.attention_quant import BITS, FIRST_OPEN
from pitlane.kernels.extension import cpu, without_vectors
from pitlane.kernels.linear import PRODUCTS, Packed
from pitlane.kernels.packing import UNIT
from pitlane.kernels.quantized import Quantized

MAX_ROWS, MAX_GROUPS, MAX_ROPES, MAX_THREADS = 64, 8, 8, 128
LINEAR, ATTENTION = range(2)  # Op.kind
BF16, INT = range(2)  # Op.weights: the panels of linear.py, of quantized.py
ROWS, NORM, MERGED = range(3)  # Op.input
PLAIN, SUM, ROTATED, SILU = range(4)  # Op.output
WORDS = 10  # of a group in a Step


@dataclass(slots=True)
class Op:
    """An operation. source, residual: indices of earlier operations; -1: the rows that the step starts from."""

    kind: int
    input: int = ROWS
    output: int = PLAIN
    weights: int = BF16
    source: int = -1
    residual: int = -1
    w: int = 0
    bias: int = 0
    outs: int = 0
    ins: int = 0
    products: int = 0
    scales: int = 0
    bits: int = 0
    input_group: int = 0
    symmetric: int = 0
    quantized: int = 0
    level: int = 0
    norm: int = 0
    selects: int = 0
    group: int = 0
    keys: int = 0
    values: int = 0
    head_stride: int = 0
    rope: int = -1
    qk_norm: int = 0
    key_rows: int = 0
    value_rows: int = 0
    row_bytes: int = 0
    row_stride: int = 0
    kv_bits: int = 0
    first_open: int = 0


def has_kernel(linear: object) -> bool:
    """Whether a linear can be an operation: one that `linear.py` or `quantized.py` packed, for its kernel in C."""
    return type(linear) is Packed or (type(linear) is Quantized and linear.level is not None)


def linear_op(linear: object, source: int, output: int) -> Op:
    """An operation that computes a linear for which `has_kernel` holds. source: its kind of input."""
    assert isinstance(linear, Packed | Quantized), f"a {type(linear).__name__} has no kernel"
    outs, ins = linear.num_outputs, linear.num_inputs
    bias = 0 if linear.bias is None else linear.bias.data_ptr()
    op = Op(LINEAR, source, output, bias=bias, outs=outs, ins=ins)
    if isinstance(linear, Packed):
        op.w, op.products = linear.weight.data_ptr(), PRODUCTS.index(linear.products)
        return op
    form = linear.form
    op.weights, op.w, op.bits, op.input_group = INT, linear.packed.data_ptr(), form.bits, form.input_group
    op.scales = 0 if linear.scales is None else linear.scales.data_ptr()
    op.symmetric, op.quantized, op.level = int(form.symmetric), int(form.quantized), linear.level or 0
    return op


def kv_fields(store: Any, layer: int) -> dict[str, int]:
    """The fields of an operation over the KV of a layer. store: dense KV, or the quantized KV of attention_quant.py."""
    first, second = store.tensors(layer)
    bits = BITS.get(store.format)
    if bits is None:
        return {"keys": first.data_ptr(), "values": second.data_ptr(), "head_stride": first.stride(0)}
    return {
        "keys": second[0].data_ptr(),
        "values": second[1].data_ptr(),
        "head_stride": second.stride(1),
        "key_rows": first[0].data_ptr(),
        "value_rows": first[1].data_ptr(),
        "row_bytes": first.shape[3],
        "row_stride": first.stride(1),
        "kv_bits": bits,
        "first_open": FIRST_OPEN,
    }


class Shape(NamedTuple):
    """Sizes of a decoder: H query heads and Hkv KV heads of size D, KV groups, and rotary embeddings."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    num_groups: int
    num_ropes: int


class Program:
    """A program of a decoder, ready to run. owned: the tensors and stores behind its addresses; kept alive with it."""

    def __init__(self, shape: Shape, ops: Sequence[Op], eps: float, scale: float, owned: object) -> None:
        self.shape, self.vocab = shape, ops[-1].outs
        header = np.array([*shape[:4], len(ops), *shape[4:]], np.int64)
        table = np.array([astuple(op) for op in ops], np.int64)
        self.handle = cpu.step_build(header.ctypes.data, table.ctypes.data, eps, scale, UNIT)
        self._step = np.zeros(8 + WORDS * MAX_GROUPS + 2 * MAX_ROPES, np.int64)
        self._step_address = self._step.ctypes.data
        weakref.finalize(self, _free, self.handle, owned).atexit = False  # a step may still run then

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        slots: Sequence[Tensor],
        parts: Sequence[Parts],
        angles: Sequence[tuple[Tensor, Tensor]],
        second: Sequence[Tensor | None],
    ) -> Tensor:
        """x [T, hidden] in float32, positions [T], logit_rows [R] -> logits [R, V] in float32.

        Writes the KV of the T tokens at `slots` [T] per group. parts: per group, what each token sees. angles: per rotary
        embedding, cos and sin [positions, D / 2]. second: per group, the positions [T] of the second queries, for sinks; None = the
        group has none. Not reentrant.
        """
        rows, count = x.shape[0], logit_rows.shape[0]
        if (
            not 0 < rows <= MAX_ROWS
            or x.dtype != torch.float32
            or x.shape[1] != self.shape.hidden
            or not x.is_contiguous()
        ):
            raise ValueError(f"x must be float32 [1 to {MAX_ROWS}, {self.shape.hidden}], got {x.dtype} {list(x.shape)}")
        given = (positions, *slots, *(tensor for tensor in second if tensor is not None))
        if any(tensor.shape != (rows,) for tensor in given):
            raise ValueError(f"positions and slots must be [{rows}], got {[list(tensor.shape) for tensor in given]}")
        groups = self.shape.num_groups
        if not len(slots) == len(parts) == len(second) == groups or len(angles) != self.shape.num_ropes:
            raise ValueError(f"needs slots and parts of {groups} groups, angles of {self.shape.num_ropes} ropes")
        logits = x.new_empty(count, self.vocab)
        addresses = [tensor.data_ptr() for tensor in (x, positions, logit_rows, logits)]
        known = min((table.shape[0] for pair in angles for table in pair), default=2**31)
        values = [rows, count, min(torch.get_num_threads(), MAX_THREADS), known, *addresses]
        for written, part, others in zip(slots, parts, second, strict=True):
            values.append(written.data_ptr())
            for tensor in part:
                values += (tensor.data_ptr(), tensor.shape[0])
            values.append(0 if others is None else others.data_ptr())
        values += [0] * (WORDS * (MAX_GROUPS - len(slots)))
        values += [tensor.data_ptr() for pair in angles for tensor in pair]
        self._step[: len(values)] = values
        cpu.step_run(self.handle, self._step_address)
        return logits


def _free(handle: int, owned: object) -> None:
    """Free a program after its last late helper has left it; `owned` lives until then."""
    cpu.step_free(handle)


def head_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of each head, as the core computes it with ATen: x [T, heads, D], weight [heads, D]."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), None, eps) * weight


@cache
def norms_as_aten(head_dim: int) -> bool:
    """Whether the norm of heads has the bits of ATen's norm here: both sum squares in the order of ATen's AVX2 code."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 6, head_dim), (6, head_dim)))
    y = torch.empty_like(x)
    cpu.head_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), 64, 6, head_dim, 1e-6)
    return torch.equal(y, head_norm_ref(x, weight, 1e-6))


@cache
def unavailable(head_dim: int) -> str | None:
    """Why steps cannot run on this machine with heads of this size; None if they can."""
    if (reason := without_vectors()) is not None:
        return reason
    return None if cpu.has_step(head_dim) else f"heads of {head_dim} are no multiple of 32 up to 256"
