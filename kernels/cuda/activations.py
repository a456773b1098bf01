"""act(gate) * up of rows [gate, up], computed in float32: SiLU, and GELU by its tanh formula.

A program takes a block of a row. Moves 3 T I elements in one pass. Reference: kernels/ops.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def gated_kernel(gate_up, y, stride, inner, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(gate_up + row * stride + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + inner + columns, inside, 0.0).to(tl.float32)
    if GELU:
        angle = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * angle))  # gate * (1 + tanh(angle)) / 2
    else:
        active = gate / (1.0 + tl.exp(-gate))
    tl.store(y + row * inner + columns, (active * up).to(y.dtype.element_ty), inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> y [T, I] = silu(gate) * up, a new tensor."""
    return _gated(gate_up, gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> y [T, I] = gelu(gate) * up by the tanh formula, a new tensor."""
    return _gated(gate_up, gelu=True)


def _gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must be [T, 2 I], got {list(gate_up.shape)}")
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    y = torch.empty((rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = rows, triton.cdiv(width // 2, BLOCK)
        gated_kernel[grid](gate_up, y, gate_up.stride(0), width // 2, gelu, BLOCK)
    return y
