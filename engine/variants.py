"""Variants: the weights of a model as the plugins of a plan build them. Lanes of equal weights share a variant.

`plan_weights` asks the plugins for every part and reads no tensor; `Variant` then reads the tensors and builds the model.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.layers import Ops
from pitlane.engine.models.llama import Llama, parts_of
from pitlane.engine.models.parts import LinearPlan, Part, Tensors
from pitlane.engine.models.registry import ModelSource, build_model
from pitlane.engine.models.weight_plan import WeightPlan
from pitlane.engine.plan.hooks import Answer, HookError, call
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.attention import SpanAttention
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.built_model import BuiltModel


def refuse(error: HookError) -> None:
    """Raise PluginFailed for a plugin that failed while a plan was prepared. The caller who asked for the plan gets it."""
    raise PluginFailed(f"{error}; take {error.plugin.name} out of the plan") from error


def plan_weights(plan: Plan, context: BuildContext) -> WeightPlan:
    """Return what every part of a model becomes under a plan. Reads no tensor."""

    def ask(hook: str, part: Part) -> tuple[LinearPlan, Plugin] | None:
        answer = call(plan.hook(hook), None, refuse, _linear_plan, part=part, context=context)
        if answer is None:
            return None
        return replace(answer.value, build=partial(_build_guarded, answer, hook)), answer.plugin

    return WeightPlan.of(parts_of(context.config), context, ask, bool(plan.hook("transform_weights")))


class Variant:
    """One set of weight tensors in memory, and the model over it."""

    def __init__(self, plan: Plan, weights: WeightPlan, source: ModelSource, context: BuildContext) -> None:
        transform = partial(_transform, plan, context) if plan.hook("transform_weights") else None
        with torch.inference_mode():
            builder = Builder(weights, source.weights, context.dtype, context.device, transform, source.stored_name)
            self.model: Llama = build_model(source.config, builder)
        self.parts: list[tuple[object, Plugin]] = builder.built
        self.num_bytes = weights.num_bytes
        self.is_batch_invariant = weights.is_batch_invariant

    def for_lane(self, plan: Plan, context: BuildContext) -> BuiltModel:
        """Return the model with the operations and the attention that the plugins of a plan built."""
        answers = {op.name: _build(plan, "build_op", kind=op.name, context=context) for op in fields(Ops)}
        ops = Ops(**{name: answer.value for name, answer in answers.items() if answer is not None})
        attention = _build(plan, "build_attention", context=context)
        built = [answer for answer in (*answers.values(), attention) if answer is not None]
        core: Attention = SpanAttention(context.config.attention_scale, context.device)
        return BuiltModel(
            self.model.with_ops(ops),
            attention.value if attention is not None else core,
            self,
            (*self.parts, *((answer.value, answer.plugin) for answer in built)),
            self.is_batch_invariant and len(built) == len(answers) + 1 and all(a.plugin.batch_invariant for a in built),
        )


def _build(plan: Plan, name: str, **values: Any) -> Answer | None:
    return call(plan.hook(name), None, refuse, **values)


def _linear_plan(plugin: Plugin, result: object) -> LinearPlan:
    if not isinstance(result, LinearPlan):
        raise TypeError(f"returned {type(result).__name__}, not a LinearPlan")
    return result


def _build_guarded(answer: Answer, hook: str, tensors: list[Tensors]) -> Any:
    """Build a part of a plugin. The error of a plugin names the plugin."""
    try:
        return answer.value.build(tensors)
    except PitlaneError:
        raise
    except Exception as error:
        return refuse(HookError(answer.plugin, hook, error))


def _transform(plan: Plan, context: BuildContext, part: Part, tensors: Tensors) -> Tensors:
    """Pass the tensors of one part of the checkpoint through the plugins. Names and shapes must stay."""
    current = tensors

    def check(plugin: Plugin, result: Any) -> None:
        nonlocal current
        if result is None:
            return
        before, after = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (current, result))
        if before != after:
            raise ValueError(f"made {after} of {before} in {part.name}; names and shapes must stay")
        current = result

    for hook in plan.hook("transform_weights"):
        call([hook], None, refuse, check, part=part, tensors=current, context=context)
    return current
