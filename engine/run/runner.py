"""Runs batches: first the KV operations, then the forward.

`launch` and `Flight.wait` are two functions, so that another loop can keep one flight outstanding. On a CPU, this runner has
finished when `launch` returns. On CUDA, `launch` queues the work and `wait` waits for its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from pitlane.engine.errors import BadOption
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import KVStore, execute
from pitlane.engine.run.batch import Attention, Batch


class Model(Protocol):
    """The methods of a model that the runner uses."""

    kv_groups: tuple[KVGroup, ...]

    def forward(self, batch: Batch, stores: list[KVStore], attention: Attention) -> Tensor:
        """Compute the batch's tokens, write their KV, return logits [R, V]."""


class EarlyExit:
    """The first layers of a model, then its norm and head (Elhoushi et al. 2024).

    num_layers: layers to run. 0 = the first exit that the model was trained with; without exits, a quarter of its layers.
    """

    def __init__(self, model: Model, num_layers: int) -> None:
        total = getattr(model, "num_layers", 0)
        num_layers = num_layers or next(iter(getattr(model, "exit_layers", ())), max(1, total // 4))
        if not 1 <= num_layers < total:
            raise BadOption(f"cannot exit after {num_layers} layers: the model has {total}; choose 1 to {total - 1}")
        self.model, self.num_layers = model, num_layers
        self.kv_groups = model.kv_groups

    def forward(self, batch: Batch, stores: list[KVStore], attention: Attention) -> Tensor:
        """Logits [R, V] after the first layers."""
        logits: Tensor = self.model.forward(batch, stores, attention, num_layers=self.num_layers)  # type: ignore[call-arg]
        return logits


@dataclass(slots=True)
class Flight:
    """A launched batch. saved: tensors of `Save` operations by key. seconds: time of the forward, set by `wait`."""

    logits: Tensor
    saved: dict[int, dict[str, Tensor]]
    started: float
    seconds: float = 0.0

    def wait(self) -> Tensor:
        """Wait until the logits [R, V] are computed, and return them."""
        if self.logits.is_cuda:
            torch.cuda.synchronize(self.logits.device)
        if not self.seconds:
            self.seconds = perf_counter() - self.started
        return self.logits


class Runner:
    """The plain runner of one lane."""

    def __init__(self, model: Model, stores: list[KVStore], attention: Attention) -> None:
        self.model = model
        self.stores = stores
        self.attention = attention

    def launch(self, batch: Batch) -> Flight:
        """Carry out the KV operations of a batch, then its forward. A batch without tokens has no forward."""
        with torch.inference_mode():
            saved = execute(self.stores, batch.operations)
            started = perf_counter()
            empty = torch.empty(0, 0)
            logits = self.model.forward(batch, self.stores, self.attention) if batch.num_tokens else empty
            flight = Flight(logits, saved, started)
            if not flight.logits.is_cuda:
                flight.wait()
        return flight
