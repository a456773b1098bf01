"""The state of a run in one safetensors file: the weights that are trained, optimizer moments and the step.

A new state replaces the file in one rename. A killed run goes on from its last state with the same losses, because batches and
rates depend on seed and step alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel as Model

from pitlane.training.errors import TrainingError
from pitlane.training.files import replacing

FILE = "training_state.safetensors"


def trained(model: Model) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters that are not frozen, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def save(folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer], progress: dict[str, Any]) -> None:
    """Write the state; a failure leaves the previous state in place."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in trained(model)}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    with replacing(folder / FILE, f"the training state to {folder}", "the previous state is intact") as part:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"progress": json.dumps(progress)}
        )


def load(folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Read the state into the model and the optimizers; return the `progress` that was saved with it."""
    path = folder / FILE
    with _opened(path) as file:
        progress = _progress(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _fill(path, model, tensors)
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def progress_in(folder: Path) -> dict[str, Any]:
    """Return the `progress` of the saved state alone."""
    with _opened(folder / FILE) as file:
        return _progress(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise TrainingError(f"nothing to resume: no {FILE} in {path.parent}; start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot read {path}: {error}; start again without --resume") from None


def _progress(file: Any) -> dict[str, Any]:
    progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    return progress


@torch.no_grad()
def _fill(path: Path, model: Model, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trained(model):
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != parameter.shape:
            raise TrainingError(f"{path} belongs to another model: {name} differs; start again without --resume")
        parameter.copy_(saved)
