"""Runs batches: KV operations first, then the forward. The only code that touches the stores' tensors.

`launch` and `Flight.wait` are apart so that an overlapped loop can keep one flight outstanding; this runner is eager and has
finished when `launch` returns (on CUDA the work is queued and `wait` ends it).
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from pitlane.engine.attention import Attention
from pitlane.engine.batch import Batch, Operation
from pitlane.engine.kv_store import KVStore, execute
from pitlane.engine.types import KVGroup


class Model(Protocol):
    """What the runner needs of a model. forward: logits [R, V] of the wanted rows."""

    kv_groups: tuple[KVGroup, ...]

    def forward(self, batch: Batch, stores: list[KVStore], attention: Attention) -> Tensor:
        """Compute the batch's tokens, write their KV, return logits [R, V]."""


@dataclass(slots=True)
class Flight:
    """A launched batch. seconds: the forward's, known after `wait`."""

    logits: Tensor
    started: float
    seconds: float = 0.0

    def wait(self) -> Tensor:
        """Logits [R, V] once they are computed."""
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
        with torch.inference_mode():
            execute(self.stores, batch.operations)
            started = perf_counter()
            flight = Flight(self.model.forward(batch, self.stores, self.attention), started)
            if not flight.logits.is_cuda:
                flight.wait()
        return flight

    def execute(self, operations: list[Operation]) -> None:
        """Carry out KV operations outside a batch."""
        with torch.inference_mode():
            execute(self.stores, operations)
