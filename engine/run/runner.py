"""Runs batches.

A `Forward` turns a batch into an `Output`. `ModelForward` is the innermost one; plugins wrap it with `build_runner`, or replace it
by a program of their own. A batch has tokens, or KV operations without tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pitlane.engine.errors import BadOption
from pitlane.engine.kv.operations import Saved
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import KVStore, execute
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.hooks import Hook, call, refuse
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.batch import Attention, Batch


class Model(Protocol):
    """The methods of a model that the runner uses."""

    kv_groups: tuple[KVGroup, ...]

    def forward(self, batch: Batch, stores: list[KVStore], attention: Attention, reads: list[Any]) -> Tensor:
        """Compute the batch's tokens, write their KV, return logits [R, V]. reads: per group, the result of `prepare`."""


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

    def forward(self, batch: Batch, stores: list[KVStore], attention: Attention, reads: list[Any]) -> Tensor:
        """Logits [R, V] after the first layers."""
        logits: Tensor = self.model.forward(batch, stores, attention, reads, num_layers=self.num_layers)  # type: ignore[call-arg]
        return logits


class Output(NamedTuple):
    """The result of a forward. logits: [R, V]. saved: the tensors of every `Save` operation, by its key."""

    logits: Tensor
    saved: Saved


Forward: TypeAlias = Callable[[Batch], Output]


@dataclass(frozen=True, slots=True)
class ModelForward:
    """The innermost forward: the operations of a batch, then its tokens. A batch without tokens has operations alone."""

    model: Model
    stores: list[KVStore]
    attention: Attention
    device: torch.device

    def __call__(self, batch: Batch) -> Output:
        saved = execute(self.stores, list(batch.operations))
        if batch.num_tokens == 0:
            return Output(torch.empty(0, 0), saved)
        reads = [self.attention.prepare(batch.seen_by(group), group) for group in range(len(batch.groups))]
        return Output(self.model.forward(batch.to(self.device), self.stores, self.attention, reads), saved)


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """The context of a `build_runner` hook: the model, its stores and its attention. build: config, dtype and device."""

    build: BuildContext
    model: Model
    stores: list[KVStore]
    attention: Attention


def fold_runner(hooks: Iterable[Hook], context: RunnerContext) -> tuple[Forward, list[tuple[object, Plugin]]]:
    """Return the forward that the plugins of a plan made, and every part that a plugin built."""
    forward: Forward = ModelForward(context.model, context.stores, context.attention, context.build.device)
    parts: list[tuple[object, Plugin]] = []

    def check(plugin: Plugin, result: object) -> object:
        if result is not None and not callable(result):
            raise TypeError(f"returned {result!r}, which is not callable")
        if result is not None:
            parts.append((result, plugin))
        return result

    answer = call(hooks, None, refuse, check, forward=forward, context=context)
    return (answer.value if answer is not None else forward), parts


class Flight(NamedTuple):
    """The result of a batch with tokens. logits: [R, V], computed. seconds: time of the forward."""

    logits: Tensor
    seconds: float


class Runner:
    """Runs the batches of one model."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def run(self, batch: Batch) -> Flight:
        """Run the forward of a batch, and wait until its logits are computed."""
        started = perf_counter()
        with torch.inference_mode():
            logits = self.forward(batch).logits
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return Flight(logits, perf_counter() - started)

    def carry_out(self, batch: Batch) -> Saved:
        """Carry out the KV operations of a batch without tokens. Returns the saved tensors."""
        with torch.inference_mode():
            return self.forward(batch).saved
