"""Quantization-aware training: a linear computes with its rounded weight, and the gradient passes to the weight as if it were not
rounded.

w' = Q(w) forward, dw = dw' backward (the straight-through estimator). Q is the rounding of `pitlane quantize --method rtn`, scales
included, so the weights that are trained are the weights that are written. Embedding, norms and head are not rounded.
Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877; Bengio et al. 2013, https://arxiv.org/abs/1308.3432
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel as Model

from pitlane.export.quantize import quantize_folder, rounded
from pitlane.export.settings import Settings as Format
from pitlane.training.errors import TrainingError

BITS = {"int3": 3, "int4": 4, "int8": 8}
FOLDER = "quantized"  # in the output folder


def format_of(name: str, group_size: int) -> Format:
    """How the weights are rounded and written. int8 has a scale per output; group_size serves int3 and int4 only."""
    if name not in BITS:
        raise TrainingError(f"no quantization {name!r}; choose {' or '.join(BITS)}")
    return Format("rtn", BITS[name], 0 if name == "int8" else group_size)


class _StraightThrough(torch.autograd.Function):
    """weight -> rounded; the gradient of the rounded weight is that of the weight."""

    @staticmethod
    def forward(context: Any, weight: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
        return rounded("weight", weight.detach().to(dtype), form, dtype).dequantized().to(weight.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class FakeQuantized(torch.nn.Linear):
    """A linear over the parameters of another linear, whose weight is rounded in every forward. dtype: of the written model."""

    def __init__(self, linear: torch.nn.Linear, form: Format, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.form, self.dtype = form, dtype

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = _StraightThrough.apply(self.weight, self.form, self.dtype)  # type: ignore[no-untyped-call]
        return F.linear(input, weight, self.bias)


def fake_quantize(model: Model, form: Format, dtype: torch.dtype) -> None:
    """Replace the linears of the layers. The names of the parameters stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            if form.group_size and module.in_features % form.group_size:
                fitting = [str(size) for size in (128, 64, 32) if module.in_features % size == 0]
                way = f"try {' or '.join(fitting)}" if fitting else "use --qat int8"
                raise TrainingError(
                    f"--qat-group-size must divide the inputs of every linear, got {form.group_size} and "
                    f"{module.in_features} ({name}); {way}"
                )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, FakeQuantized(module, form, dtype))


def write_quantized(folder: Path, form: Format) -> Path:
    """Write the trained model of a folder as a quantized checkpoint (compressed-tensors) into a folder inside it."""
    target = folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    quantize_folder(folder, form, target)
    return target
