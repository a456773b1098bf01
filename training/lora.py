"""LoRA: train two small matrices beside every chosen linear of a frozen model, and write them as an adapter in PEFT's format.

A linear with an adapter computes x W^T + (alpha / r) x A^T B^T, with A [r, in] and B [out, r] in float32. B starts at zero, so
training starts from the model itself. The frozen linears are kept in the dtype of the products. The loop, its state and its data
are those of every other run; the plugin `lora` serves the result. Source: Hu et al. 2021, arXiv:2106.09685
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel as Model

from pitlane.training.errors import TrainingError
from pitlane.training.files import replacing
from pitlane.training.loop import PRODUCTS, Progress, Report, Settings, settled
from pitlane.training.losses import LabelLoss
from pitlane.training.models import read_model
from pitlane.training.train import DTYPES, Data, Output, fit

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What to train. targets: names of linears, as in `TARGETS`. The change of a weight is scaled by alpha / rank."""

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = tuple(TARGETS)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainingError(f"the rank of an adapter must be >= 1, got {self.rank}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise TrainingError(f"no linear {', '.join(unknown)!r}; targets are all, or some of {','.join(TARGETS)}")

    def config(self, model_name: str) -> dict[str, Any]:
        """Return the content of `adapter_config.json`."""
        alpha = int(self.alpha) if self.alpha == int(self.alpha) else self.alpha
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model_name,
            "r": self.rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": [TARGETS[name] for name in TARGETS if name in self.targets],
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
        }


class LowRank(torch.nn.Module):
    """A frozen linear with an adapter."""

    def __init__(self, linear: torch.nn.Linear, adapter: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear, adapter.alpha / adapter.rank
        bound = linear.in_features**-0.5  # the start of PEFT: kaiming_uniform with a = sqrt(5)
        start = torch.empty(adapter.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = torch.nn.Parameter(start)
        self.lora_B = torch.nn.Parameter(torch.zeros(linear.out_features, adapter.rank))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        low = self.scale * F.linear(x, self.lora_A)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.T).view_as(y)


def add_adapter(model: Model, adapter: Adapter, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Freeze a model, with linears in `dtype`, and put an adapter beside every chosen linear of its layers."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    chosen = {TARGETS[name] for name in adapter.targets}
    missing = set(chosen)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or ".layers." not in name:
            continue
        module.to(dtype)
        parent, _, last = name.rpartition(".")
        if last in chosen:
            setattr(model.get_submodule(parent), last, LowRank(module, adapter, generator))
            missing.discard(last)
    if missing:
        raise TrainingError(f"the model has no linears {', '.join(sorted(missing))}; choose other --targets")


def write_adapter(model: Model, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the adapter of a model as PEFT does: the config, then the weights."""
    tensors = {
        f"base_model.model.{name}.weight": tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    text, intact = json.dumps(config, indent=2) + "\n", "the previous adapter is intact"
    with replacing(folder / CONFIG, f"the adapter to {folder}", intact) as part:
        part.write_text(text, encoding="utf-8")
    with replacing(folder / WEIGHTS, f"the adapter to {folder}", intact) as part:
        save_file(tensors, part, {"format": "pt"})
        part.chmod(0o644)  # safetensors lets only the owner read


def read_adapter(model: Model, folder: Path, config: dict[str, Any]) -> None:
    """Start from the weights of an adapter of the same shape instead of random ones."""
    _check_same(folder, config)
    saved = load_file(folder / WEIGHTS)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            tensor.data.copy_(saved[f"base_model.model.{name}.weight"])


def train_adapter(
    model_name: str,
    start: Path,
    data: Data,
    adapter: Adapter,
    settings: Settings,
    output: Output,
    report: Report,
    first: Path | None = None,
) -> Progress:
    """Train an adapter for the model in the folder `start`.

    model_name: the model's name in the adapter's config. first: folder of an adapter to go on from, with other data or rates.
    """
    if settings.qat:
        raise TrainingError(
            "--qat trains the weights of a model, and --lora leaves them as they are; leave one of them out"
        )
    output.prepare()
    config = adapter.config(model_name)
    if output.goes_on:
        _check_same(output.folder, config)
    model = read_model(start)
    settings = settled(settings, torch.device(output.device), output.folder)
    add_adapter(model, adapter, settings.seed, PRODUCTS[settings.products])
    if first is not None:
        read_adapter(model, first, config)
    export = partial(write_adapter, folder=output.folder, config=config, dtype=DTYPES[output.dtype])
    return fit(model, start, data, LabelLoss(), settings, output, report, export)


def _check_same(folder: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with another adapter. The saved state has the shapes of A and B, but no alpha and no model name."""
    try:
        before = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        changed = [key for key in config if before.get(key) != config[key]]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{folder} holds no adapter of --lora ({error}); choose another folder") from None
    if changed:
        raise TrainingError(f"the adapter in {folder} has other settings ({', '.join(changed)}); go on with the same")
