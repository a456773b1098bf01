"""A model that the hooks of a plan built, with the plugin of every part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pitlane.engine.kv.store import KVStore, KVStorePlan
from pitlane.engine.kv.visibility import Visibility
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.hooks import Answer, Hook
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.runner import Forward, Model, RunnerContext, fold_runner


class Weights(Protocol):
    """The weights under a model. num_bytes: their memory."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model that can run. variant: keeps the weights alive; other models may share them.

    parts: all that plugins built: linears, operations, attention, visibilities, stores, runners. is_batch_invariant: the result
    of a row depends on no other row of the batch. runner_hooks: build the runners. visibilities, stores: of the KV groups.
    sample: the operation of a plugin that draws tokens on the device.
    """

    model: Model
    attention: Attention
    variant: Weights
    context: BuildContext
    parts: list[tuple[object, Plugin]]
    is_batch_invariant: bool
    runner_hooks: tuple[Hook, ...]
    visibilities: tuple[Visibility, ...]
    stores: tuple[KVStorePlan, ...]
    sample: Answer | None = None

    def forward(self, stores: list[KVStore], model: Model | None = None) -> Forward:
        """Return the forward over stores, with the plugins that wrap it. model: the first layers of the model, for early exit."""
        context = RunnerContext(self.context, model or self.model, stores, self.attention)
        forward, parts = fold_runner(self.runner_hooks, context)
        self.parts.extend(parts)
        return forward

    def culprit(self, error: BaseException) -> Plugin | None:
        """Return the plugin whose part raised an error, or None. The innermost traceback frame that runs a part decides.

        A frame runs a part if it is a method of the part, the code of the part, or code of the plugin's module. So a part needs
        no wrapper; a wrapper would cost time in every layer.
        """
        by_object = {id(part): plugin for part, plugin in self.parts}
        by_code = {id(part.__code__): plugin for part, plugin in self.parts if hasattr(part, "__code__")}
        by_module = {type(plugin).__module__: plugin for _, plugin in self.parts}
        culprit, traceback = None, error.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            owner = by_object.get(id(frame.f_locals.get("self"))) or by_code.get(id(frame.f_code))
            culprit = owner or by_module.get(frame.f_globals.get("__name__", "")) or culprit
            if self._is_wrong(frame.f_locals.get("q"), frame.f_locals.get("out")):
                culprit = by_object.get(id(self.attention)) or culprit
            traceback = traceback.tb_next
        return culprit

    def _is_wrong(self, q: object, out: object) -> bool:
        """Whether `out` is no result of an attention for the queries `q`: the decoder fails behind such a result."""
        if not isinstance(q, torch.Tensor) or out is None:
            return False
        return not isinstance(out, torch.Tensor) or out.numel() != q.numel() or out.dtype != self.context.dtype
