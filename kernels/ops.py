"""rms_norm and silu_mul over rows, computed in float32, in one pass over memory. The results are bfloat16.

rms_norm: y [T, D] = x / sqrt(mean(x^2) + eps) * w, where x is float32 or bfloat16; moves 6 or 4 T D bytes, ATen needs eight
passes. silu_mul: y [T, I] = silu(gate) * up, where x [T, 2 I] = gate, up; moves 6 T I bytes, ATen needs three passes. A row's
result does not depend on the other rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pitlane.kernels.extension import cpu, without_vectors


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference in float32. The result has the dtype of the weight."""
    value = x.float()
    return (value * (value.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(weight.dtype)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """The reference in float32."""
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] in float32 or bfloat16, weight [D] in bfloat16 -> y [T, D] in bfloat16, a new tensor."""
    x = x.contiguous()
    rows, dim = x.shape
    is_fitting = weight.dtype == torch.bfloat16 and weight.shape == (dim,) and weight.is_contiguous()
    if x.dtype not in (torch.float32, torch.bfloat16) or not is_fitting:
        raise ValueError(
            f"x must be float32 or bfloat16 and weight bfloat16, [T, {dim}] and [{dim}], got {x.dtype}, {_described(weight)}"
        )
    y = torch.empty_like(x, dtype=torch.bfloat16)
    addresses = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    cpu.rms_norm_bf16(*addresses, rows, dim, torch.get_num_threads(), x.dtype == torch.float32, eps)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> y [T, I], a new tensor."""
    gate_up = gate_up.contiguous()
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.dtype != torch.bfloat16 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be bfloat16 [T, 2 I], got {_described(gate_up)}")
    y = gate_up.new_empty(rows, dim)
    cpu.silu_mul_bf16(gate_up.data_ptr(), y.data_ptr(), rows, dim, torch.get_num_threads())
    return y


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"


@cache
def unavailable() -> str | None:
    """Why these kernels cannot run on this machine; None if they can. Compares them with the references, once per process."""
    if (reason := without_vectors()) is not None:
        return reason
    x = torch.randn(3, 74, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float() * 1.001
    pairs = (
        (rms_norm(x, x[0], 1e-5), rms_norm_ref(x, x[0], 1e-5)),
        (rms_norm(wide, x[0], 1e-5), rms_norm_ref(wide, x[0], 1e-5)),
        (silu_mul(x), silu_mul_ref(x)),
    )
    if not all(torch.allclose(result.float(), expected.float(), rtol=2**-7, atol=1e-6) for result, expected in pairs):
        return "their results differ from the references on this machine; please report it"
    return None
