"""The kernels refuse wrong arguments before C reads memory, also under `python -O`, which removes asserts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pitlane.kernels import attention, linear, ops
from pitlane.kernels.extension import cpu

here = pytest.mark.skipif(
    bool(ops.unavailable() or linear.unavailable() or attention.unavailable(32)), reason="no kernels here"
)


def optimised(module: ModuleType) -> Any:
    """A copy of a module, compiled as `python -O` compiles it."""
    copy, file = ModuleType(module.__name__), Path(str(module.__file__))
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec", optimize=1), vars(copy))
    return copy


OPS, LINEAR, ATTENTION = (optimised(module) for module in (ops, linear, attention))


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    seen = attention.Seen(0, np.arange(4, dtype=np.int32), [0], [0], [4])
    ATTENTION.attend(q, keys, values, attention.Parts.of([seen], 1), 1.0, out)


KEYS = ones(2, 8, 32)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "norm of one number": (lambda: OPS.rms_norm(ones(2, 32), ones(1), 1e-5), r"\[T, 32\] and \[32\], got .* \[1\]"),
    "norm in float32": (lambda: OPS.rms_norm(ones(2, 32), ones(32, dtype=torch.float32), 1e-5), "float32"),
    "norm with gaps": (lambda: OPS.rms_norm(ones(2, 32), ones(32, 2)[:, 0], 1e-5), r"strides \(2,\)"),
    "odd gate": (lambda: OPS.silu_mul(ones(2, 33)), r"\[T, 2 I\], got .* \[2, 33\]"),
    "bias of one number": (lambda: LINEAR.Packed(ones(64, 32), ones(1)), r"\[64\], got .* \[1\]"),
    "bias in float32": (lambda: LINEAR.Packed(ones(64, 32), ones(64, dtype=torch.float32)), "float32"),
    "odd weight": (lambda: LINEAR.pack(ones(64, 33)), r"even inputs, got .* \[64, 33\]"),
    "unknown products": (lambda: LINEAR.Packed(ones(64, 32), products="half"), "vectors, amx, float32, got half"),
    "narrow rows": (lambda: LINEAR.Packed(ones(64, 32))(ones(2, 30)), r"\[M, 32\], got .* \[2, 30\]"),
    "heads that do not divide": (lambda: attend(ones(1, 3, 32), KEYS, KEYS, ones(1, 3, 32)), "shapes do not fit"),
    "narrow keys": (lambda: attend(ones(1, 4, 64), KEYS, KEYS, ones(1, 4, 64)), "shapes do not fit"),
    "small out": (lambda: attend(ones(1, 4, 32), KEYS, KEYS, ones(1, 2, 32)), "shapes do not fit"),
    "fewer values": (lambda: attend(ones(1, 4, 32), KEYS, KEYS[:, :4], ones(1, 4, 32)), "shapes do not fit"),
    "keys in float32": (lambda: attend(ones(1, 4, 32), KEYS.float(), KEYS.float(), ones(1, 4, 32)), "float32"),
    "keys with gaps": (
        lambda: attend(ones(1, 4, 32), ones(2, 8, 64)[..., :32], ones(2, 8, 64)[..., :32], ones(1, 4, 32)),
        "must follow each other",
    ),
}


@here
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_read_past_its_end_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


@here
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rms_norm_bf16", (1, 1, 1, 1, 32, 0, 1e-5)),
        ("rms_norm_bf16", (1, 1, 1, -1, 32, 1, 1e-5)),
        ("rms_norm_bf16", (1, 0, 1, 1, 32, 1, 1e-5)),
        ("silu_mul_bf16", (1, 1, 1, 0, 1)),
        ("silu_mul_bf16", (0, 1, 1, 32, 1)),
        ("linear_bf16", (1, 1, 0, 1, 1, 2, 32, 3, 0, 1)),
        ("linear_bf16", (1, 1, 0, 1, 1, 2, 32, 32, 0, 0)),
        ("linear_bf16", (1, 1, 0, 1, 0, 2, 32, 32, 0, 1)),
        ("linear_bf16", (1, 1, 0, 1, 0, 1, 32, 32, 2, 1)),
        ("linear_bf16", (1, 1, 0, 1, 1, 1, 32, 32, 3, 1)),
        ("linear_bf16", (1, 1, 0, 1, 1, 1, 32, 31, 2, 1)),
        ("attention_bf16", (*[1] * 9, 1, 1, 3, 2, 32, 96, 256, 1, 1.0)),
        ("attention_bf16", (*[1] * 9, 1, 1, 4, 0, 32, 96, 256, 1, 1.0)),
        ("attention_bf16", (*[1] * 9, 1, 1, 4, 2, 33, 96, 256, 1, 1.0)),
        ("attention_bf16", (*[0] * 9, 1, 1, 4, 2, 32, 96, 256, 1, 1.0)),
    ],
)
def test_c_refuses_sizes_that_no_memory_has(name: str, arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        getattr(cpu, name)(*arguments)
